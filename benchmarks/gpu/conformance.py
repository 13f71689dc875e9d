"""Section 2: every optimizer of the catalog does on the device what it does on the CPU, however it is run and kept.

The yardstick is the plain rule on the CPU, which the tests hold to each paper's formula in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from poise.catalog import Method
from poise.linalg import polar
from poise.optim.engine import kernels

from .catalog import SHAPES, Grads, build, distance, draw, entries, leaves, play, same
from .settings import Check, Found, Settings, Tasks

# Parameters and state, what most people use first: where the time ends, this much is known of every entry.
FORMATS = (
    ("float32", "fp32"), ("bfloat16", "int8"), ("float32", "int4"), ("bfloat16", "fp32"),
    ("float32", "int8"), ("float32", "bf16"), ("bfloat16", "int4"), ("bfloat16", "bf16"),
)  # fmt: skip

# Largest distance of float32 weights of size 1 after 6 steps of about 0.01: a dozen roundings.
NEAR = 3e-6
# Where rounding is stochastic, an element whose last bit differs may fall to the other side: rarely. Share of elements.
APART = 0.005
# Distance from the float32 run after 20 steps against its length, by state format.
DRIFT = {"fp32": 1e-4, "bf16": 0.02, "int8": 0.05, "int4": 0.3}
# The same where the device multiplies matrices in bfloat16 and the CPU in float32.
PRODUCTS = 0.05
RATES = (1.0, 0.9, 0.7, 0.5, 0.3, 0.1)


def tasks(settings: Settings) -> Tasks:
    """One for each entry and format, all entries in one format before the next."""
    chosen: Tasks = {}
    for dtype, state in FORMATS:
        for entry in entries():
            chosen[f"{entry.name} {dtype} {state}"] = partial(checks, entry, dtype, state, settings.device)
        if (dtype, state) == FORMATS[0]:
            chosen["adamw as torch"] = partial(as_torch, settings.device)
    return chosen


def checks(entry: Method, dtype: str, state: str, device: str) -> Found:
    """What is said of one entry in one format."""
    title = f"{entry.name} {dtype} {state}"
    with float32_products():
        found = [
            as_on_cpu(title, entry, dtype, state, device),
            *compiled(title, entry, dtype, state, device),
            resumed(f"{title}: resumes bit for bit", entry, dtype, state, device, "eager"),
        ]
        if dtype == "float32":
            found.append(near_float32(title, entry, state, device))
        if (dtype, state) == ("bfloat16", "int8"):
            found.append(resumed(f"{title}: resumes bit for bit, compiled", entry, dtype, state, device, "auto"))
    if (dtype, state) == FORMATS[0] and multiplies(entry):
        found.append(own_products(title, entry, device))
    return Found(found)


@contextmanager
def float32_products() -> Iterator[None]:
    """Within it, rules multiply matrices in float32 wherever they are."""
    held = polar.fast_bfloat16
    polar.fast_bfloat16 = lambda _: False
    try:
        yield
    finally:
        polar.fast_bfloat16 = held


def multiplies(entry: Method) -> bool:
    """Whether a rule of the entry sees matrices."""
    opt: Any = build(entry, leaves([torch.zeros(2, 2)]), backend="eager")
    return any(link.unit != "element" for rule in opt._roster.rules.values() for link in rule)


def problem(dtype: str, device: str, steps: int = len(RATES)) -> tuple[list[Tensor], Grads]:
    """The weights and gradients of the conformance tests, some gradients missing, drawn on the CPU."""
    missing = [(t, i) for t, i in ((1, 0), (2, 3)) if t < steps]
    start, grads = draw(SHAPES, steps, dtype=getattr(torch, dtype), missing=missing)
    return moved(start, device), [[None if g is None else g.to(device) for g in row] for row in grads]


def moved(tensors: Sequence[Tensor], device: str) -> list[Tensor]:
    return [t.detach().to(device) for t in tensors]


def train(entry: Method, dtype: str, device: str, rates: Sequence[float] | None = RATES, **options: Any) -> list[Tensor]:
    """Weights after all steps, on the CPU."""
    start, grads = problem(dtype, device)
    params = leaves(start)
    return moved(play(build(entry, params, **options), params, grads, rates), "cpu")


def agree(name: str, found: Sequence[Tensor], wanted: Sequence[Tensor], plain: bool) -> Check:
    """That two runs end at the same weights: to rounding, or, where rounding draws lots, but for a few elements."""
    if plain:
        return Check.at_most(name, distance(found, wanted), NEAR, "largest distance of a weight")
    pairs = zip(found, wanted, strict=True)
    apart = sum(int((~torch.isclose(a.float(), b.float(), rtol=1e-5, atol=1e-5)).sum()) for a, b in pairs)
    return Check.at_most(name, apart / sum(b.numel() for b in wanted), APART, "share of weights that differ")


def as_on_cpu(title: str, entry: Method, dtype: str, state: str, device: str) -> Check:
    found = train(entry, dtype, device, state=state, backend="eager")
    wanted = train(entry, dtype, "cpu", state=state, backend="eager")
    return agree(f"{title}: as on the CPU", found, wanted, (dtype, state) == FORMATS[0])


def compiled(title: str, entry: Method, dtype: str, state: str, device: str) -> list[Check]:
    """What users get is the plain rule, and a schedule compiles nothing again."""
    start, grads = problem(dtype, device)
    params = leaves(start)
    opt = build(entry, params, state=state)
    play(opt, params, grads[:3], RATES[:3])
    before = compilations()
    for group in opt.param_groups:
        group["lr"] = group["initial_lr"]  # to which the rates refer
    found = play(opt, params, grads[3:], RATES[3:])
    again = compilations() - before
    wanted = train(entry, dtype, device, state=state, backend="eager")
    return [
        agree(f"{title}: compiled as eager", moved(found, "cpu"), wanted, (dtype, state) == FORMATS[0]),
        Check.at_most(f"{title}: a schedule compiles nothing again", again, 0, "compilations after the third step"),
    ]


def compilations() -> int:
    """How often torch.compile, or poise's own compiler for the CPU, has compiled in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"]) + kernels.compiled_count()


def resumed(name: str, entry: Method, dtype: str, state: str, device: str, backend: str) -> Check:
    """State out, fresh objects with another learning rate, state in, on: every bit as if nothing had been."""
    start, grads = problem(dtype, device)
    params = leaves(start)
    opt = build(entry, params, state=state, backend=backend)
    fresh = leaves(play(opt, params, grads[:3]))
    again = build(entry, fresh, state=state, backend=backend, lr=0.5)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    wanted = play(opt, params, grads[3:])
    found = play(again, fresh, grads[3:])
    states = [[v for p in ps for v in o.state[p].values()] for o, ps in ((again, fresh), (opt, params))]
    good = same(found, wanted) and same(*states)
    return Check(name, good, message="" if good else f"weights {distance(found, wanted):.3g} apart")


def near_float32(title: str, entry: Method, state: str, device: str) -> Check:
    """Twenty steps with a drift, against the run on the CPU with float32 state, by the length of that run."""
    start, noise = draw([(64, 128)], 20, dtype=torch.float32)
    pull = draw([(64, 128)], 0, seed=7, dtype=torch.float32)[0][0]
    ends = []
    for where, kept in ((device, state), ("cpu", "fp32")):
        params = leaves(moved(start, where))
        grads: Grads = [[(0.5 * pull + g).to(where) for g in row if g is not None] for row in noise]
        ends.append(play(build(entry, params, state=kept, backend="eager"), params, grads)[0].cpu())
    gap = float((ends[0] - ends[1]).norm() / (ends[1] - start[0]).norm())
    return Check.at_most(f"{title}: near the CPU's float32 run", gap, DRIFT[state], "distance by length of the run")


def own_products(title: str, entry: Method, device: str) -> Check:
    """With the precision that the device multiplies fastest in."""
    found = train(entry, "float32", device, backend="eager")
    with float32_products():
        wanted = train(entry, "float32", "cpu", backend="eager")
    start = problem("float32", "cpu")[0]
    gap = sum(float((a - b).square().sum()) for a, b in zip(found, wanted, strict=True))
    moves = sum(float((b - s).square().sum()) for b, s in zip(wanted, start, strict=True))
    figure = (gap / moves) ** 0.5 if moves else float("inf")
    return Check.at_most(f"{title}: near with the device's own products", figure, PRODUCTS, "distance by length of the run")


def as_torch(device: str) -> Found:
    """poise's AdamW, compiled, against both of torch's that run on a GPU."""
    from poise.optim import AdamW

    found = []
    kinds: dict[str, dict[str, Any]] = {"fused": {"fused": True}, "foreach": {"foreach": True}}
    for kind, options in kinds.items():
        ends = []
        for ours in (True, False):
            start, grads = problem("float32", device)
            params = leaves(start)
            opt = AdamW(params, lr=0.01) if ours else torch.optim.AdamW(params, lr=0.01, **options)
            ends.append(play(opt, params, grads, RATES))
        found.append(Check.at_most(f"adamw: as torch's {kind} one", distance(*ends), NEAR, "largest distance of a weight"))
    return Found(found)
