"""Section 3: time of a step as a ratio to torch's optimizers on the device, both stepping in turns in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lists
import pairs
import torch
from torch.nn import Parameter

from .settings import Check, Found, Settings, Tasks, forget, free_memory, synchronize


@dataclass(frozen=True)
class Row:
    """An optimizer of poise on a list, and the one of torch that it takes turns with."""

    name: str
    cls: str
    params: str = "gpt"
    settings: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    peer: str = "AdamW"
    theirs: Mapping[str, Any] = field(default_factory=lambda: {"fused": True})


MOMENTUM = {"momentum": 0.9}
BF16 = torch.bfloat16
ROWS = (
    Row("null: torch's fused AdamW against itself", ""),
    Row("adamw", "AdamW"),
    Row("adamw int8", "AdamW", settings={"state": "int8"}),
    Row("adamw bf16 weights", "AdamW", dtype=BF16),
    Row("lion", "Lion"),
    Row("adamw large", "AdamW", "large"),
    Row("muon", "Muon", "hidden", peer="Muon", theirs={}),
    Row("adamw int4", "AdamW", settings={"state": "int4"}),
    Row("adamw small", "AdamW", "300 small"),
    Row("adamw clipped", "clipped", theirs={"fused": True, "clip": 1.0}),
    Row("sgd", "SGD", settings=MOMENTUM, peer="SGD", theirs={**MOMENTUM, "fused": True}),
    Row("adamw int8 large", "AdamW", "large", {"state": "int8"}),
    Row("adamw bf16 weights int8", "AdamW", settings={"state": "int8"}, dtype=BF16),
    Row("adamw eager", "AdamW", settings={"backend": "eager"}),
)

BLOCK: lists.Shapes = [(3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096), (1024,), (1024,)]
EMBEDDING = (50304, 1024)
# Weights, gradients and state of two float32 AdamWs, and what one of them needs beside them in its step.
BYTES = 2 * 16 + 16


def tasks(settings: Settings) -> Tasks:
    return {f"step: {row.name}": partial(measure, row, settings) for row in ROWS}


def shapes(name: str, settings: Settings) -> lists.Shapes:
    """A list of `lists.LISTS`, or "large": up to 24 blocks of width 1024 and their embedding, 353M, as the memory allows."""
    if settings.device == "cpu":  # for the logic
        small: dict[str, lists.Shapes] = {"300 small": lists.LISTS["300 small"][:10], "hidden": [(96, 64), (64, 96)]}
        return small.get(name, [(96, 64), (64, 96), (64,)])
    if name != "large":
        return lists.LISTS[name]
    room = free_memory(settings.device) * 0.8 / BYTES
    fixed, block = EMBEDDING[0] * EMBEDDING[1], sum(torch.Size(shape).numel() for shape in BLOCK)
    blocks = int(max(1, min(24, (room - fixed) // block)))
    return [EMBEDDING if room > fixed + block else BLOCK[2], *BLOCK * (min(blocks, 4) if settings.quick else blocks)]


def make(name: str, dtype: torch.dtype, settings: Settings) -> list[Parameter]:
    """Parameters of size 0.02 with gradients of size 0.01, the same for every contender."""
    generator = torch.Generator(settings.device).manual_seed(0)

    def normal(shape: tuple[int, ...], size: float) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, device=settings.device) * size).to(dtype)

    made = [Parameter(normal(shape, 0.02)) for shape in shapes(name, settings)]
    for p in made:
        p.grad = normal(tuple(p.shape), 0.01)
    return made


class Contender:
    """An optimizer on its own copy of the list, its first step taken."""

    def __init__(self, row: Row, ours: bool, settings: Settings) -> None:
        self.device = settings.device
        self.params = make(row.params, row.dtype if ours else torch.float32, settings)
        options = dict(row.settings if ours else row.theirs)
        self.clip = options.pop("clip", None)
        synchronize(self.device)
        start = time.perf_counter()
        theirs = getattr(torch.optim, row.peer)
        self.optimizer = build(row.cls, self.params, options) if ours else theirs(self.params, **options)
        self.step()
        synchronize(self.device)
        self.first_step_s = time.perf_counter() - start

    def step(self) -> None:
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.params, self.clip)
        self.optimizer.step()


def build(cls: str, params: list[Parameter], options: Mapping[str, Any]) -> torch.optim.Optimizer:
    from poise import optim
    from poise.optim.transforms.adaptive import adam

    if cls == "clipped":
        return optim.Optimizer(params, optim.chain(optim.clip(1.0), adam()), lr=1e-3, weight_decay=1e-2)
    return getattr(optim, cls)(params, **options)


def measure(row: Row, settings: Settings) -> Found:
    """First step, then rounds of both in turns."""
    forget(settings.device)
    theirs = Contender(row, False, settings)
    ours = Contender(row, True, settings) if row.cls else Contender(row, False, settings)
    before = ours.params[-1].detach().clone()
    for one in (ours, theirs):
        for _ in range(2):
            one.step()
    rounds, budget = (5, 1.0) if settings.quick else (30, 6.0)
    taken = alternate([theirs.step, ours.step], rounds, min(budget, max(1.0, settings.seconds)), settings.device)
    q1, median, q3 = pairs.quartiles([b / a for a, b in zip(*taken, strict=True)])
    elements = sum(p.numel() for p in ours.params)
    known = {
        "name": row.name,
        "list": row.params,
        "parameters": elements,
        "tensors": len(ours.params),
        "peer": f"torch {row.peer}",
        "ratio": median,
        "ratio_q1": q1,
        "ratio_q3": q3,
        "ms": statistics.median(taken[1]) * 1e3,
        "peer_ms": statistics.median(taken[0]) * 1e3,
        "rounds": len(taken[0]),
        "first_step_s": ours.first_step_s,
        **launches(ours.step, settings.device),
    }
    moved = not torch.equal(before, ours.params[-1].detach())
    return Found([Check(f"step: {row.name}: runs and moves the weights", moved)], [known])


def alternate(steps: list[Callable[[], object]], rounds: int, budget: float, device: str) -> list[list[float]]:
    """As `pairs.alternate`, with the device waited for before and after: seconds per call of each step, round by round."""

    def seconds(step: Callable[[], object]) -> float:
        synchronize(device)
        calls, start = 0, time.perf_counter()
        while calls == 0 or (time.perf_counter() - start < pairs.SHORTEST and calls < 1000):
            step()
            calls += 1
        synchronize(device)
        return (time.perf_counter() - start) / calls

    taken: list[list[float]] = [[] for _ in steps]
    start = time.perf_counter()
    for i in range(rounds):
        for j in [(i + offset) % len(steps) for offset in range(len(steps))]:
            taken[j].append(seconds(steps[j]))
        if (time.perf_counter() - start) * (i + 2) / (i + 1) > budget:
            break
    return taken


def launches(step: Callable[[], object], device: str) -> dict[str, Any]:
    """What one step has the device do, by torch's profiler: kernels and copies, and milliseconds that it is busy with them.

    Far below the time of the step, the host is what limits it. Null where the profiler sees nothing of the device.
    """
    none: dict[str, Any] = {"launches": None, "busy_ms": None}
    if device != "cuda":
        return none
    try:
        from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            step()
            synchronize(device)
        events = [e for e in seen.events() or () if e.device_type == DeviceType.CUDA]
    except Exception:  # it needs rights that not everyone has, and is only an explanation
        return none
    return {"launches": len(events), "busy_ms": sum(e.device_time for e in events) / 1e3} if events else none
