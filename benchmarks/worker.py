"""Measures one row, or rows that take turns, in a process of its own; started by step_time.py.

What is known is written at once, one JSON object a line: {"key": "poise:lion", "first_step_s": 3.1}. A process that crashes
or runs out of time after that has still said it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lists
import pairs
import torch
from rows import FUSED, ROWS, Row
from torch import Tensor
from torch.nn import Parameter

Tell = Callable[..., None]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("result", type=Path)
    parser.add_argument("--first-only", action="store_true")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=60.0)
    parser.add_argument("keys", nargs="+")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    def tell(key: str, **known: Any) -> None:
        with args.result.open("a") as file:
            file.write(json.dumps({"key": key, **known}) + "\n")

    _as_in_training()
    contenders = [one for key in args.keys if (one := begin(ROWS[key], tell)) is not None]
    _finish_in_background()
    if not args.first_only and contenders:
        measure(contenders, args.rounds, args.budget, tell)


class Contender:
    """An optimizer of one row on its own copy of the list, its first step done."""

    def __init__(self, row: Row) -> None:
        self.row = row
        row.load()  # before the clock starts
        _first_of_all()
        self.params = lists.make(row.params, row.dtype)
        self.grads = [p.grad for p in self.params if p.grad is not None]
        start = time.perf_counter()
        self.optimizer = row.make(self.params)
        self.step()
        self.first_step_s = time.perf_counter() - start

    def step(self) -> None:
        if self.params[0].grad is None:  # heavyball takes the gradients away, and would do nothing in its next step
            for p, grad in zip(self.params, self.grads, strict=True):
                p.grad = grad
        self.optimizer.step()

    def steps(self) -> None:
        """What is timed."""
        for _ in range(self.row.period):
            self.step()

    def warm_up(self) -> None:
        if not self.row.slow:
            for _ in range(2):
                self.step()


def _finish_in_background() -> None:
    """Wait for what the first compilation on a machine still does after the first step."""
    with contextlib.suppress(ImportError):
        from poise.optim.engine import headers

        headers.wait()


def _as_in_training() -> None:
    """Free a block as large as activations are: from then on the C library keeps freed memory, as it does in training."""
    torch.zeros(30 * 2**18)


def _first_of_all() -> None:
    """What the first torch optimizer of a process costs whatever it is: torch imports its compiler for it."""
    p = Parameter(torch.zeros(1))
    p.grad = torch.zeros(1)
    torch.optim.AdamW([p], fused=True).step()


def begin(row: Row, tell: Tell) -> Contender | None:
    """Import, build and step once; None, and a note, if that fails."""
    try:
        contender = Contender(row)
    except ModuleNotFoundError as error:
        tell(row.key, failed=f"not installed (no module {error.name})")
        return None
    except Exception as error:
        tell(row.key, failed=f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        return None
    tell(row.key, first_step_s=contender.first_step_s, kernels=_kernels(row), version=_version(row.library))
    return contender


def measure(contenders: list[Contender], rounds: int, budget: float, tell: Tell) -> None:
    """Everything but the first step."""
    for one in contenders:
        if one.row.cls == "Muon" and (told := orthogonality(one)) is not None:
            tell(one.row.key, orthogonality_error=told)
        held = state_bytes(one.optimizer, one.params)
        parameters = sum(p.numel() for p in one.params)
        # the least that an update can move: parameters and state are read and written, gradients are read
        least = sum(2 * p.nbytes + grad.nbytes for p, grad in zip(one.params, one.grads, strict=True)) + 2 * held
        least += one.row.again * parameters
        tell(one.row.key, state_bytes_per_param=held / parameters, least_bytes_per_param=least / parameters)
        one.warm_up()
    reference = Contender(dataclasses.replace(FUSED, params=contenders[0].row.params))
    reference.warm_up()
    last = [one.params[-1].detach().clone() for one in contenders]
    bare = {
        one.row.key: pairs.newton_schulz_products(lists.LISTS[one.row.params], _matrix_dtype(), one.row.iterations)
        for one in contenders
        if one.row.iterations
    }
    steps = [reference.step, *(one.steps for one in contenders), *bare.values()]
    taken = pairs.alternate(steps, rounds, budget)
    products = dict(zip(bare, taken[1 + len(contenders) :], strict=True))
    for i, one in enumerate(contenders, 1):
        taken[i] = [seconds / one.row.period for seconds in taken[i]]
    copy = pairs.copy_bandwidth()
    for i, one in enumerate(contenders, 1):
        if torch.equal(one.params[-1], last[i - 1]):
            tell(one.row.key, failed="failed: its steps changed nothing")
            continue
        compare(one, taken[0], taken[i], copy, tell)
        for other, theirs in zip(contenders, taken[1 : 1 + len(contenders)], strict=True):
            if other.row.key == "torch:muon" and other is not one:
                q1, median, q3 = ratio(taken[i], theirs)
                tell(one.row.key, ratio_to_torch_muon=median, ratio_to_torch_muon_q1=q1, ratio_to_torch_muon_q3=q3)
        if one.row.key in products:
            q1, median, q3 = ratio(taken[i], products[one.row.key])
            tell(one.row.key, ratio_to_products=median, ratio_to_products_q1=q1, ratio_to_products_q3=q3)
        if one.row.exact is not None:
            tell(one.row.key, trajectory_error=trajectory_error(one.row, ROWS[one.row.exact]))


def compare(one: Contender, fused: list[float], own: list[float], copy: float, tell: Tell) -> None:
    """Tell the figures of one row against torch's fused AdamW."""
    q1, median, q3 = ratio(own, fused)
    parameters = sum(p.numel() for p in one.params)
    tell(
        one.row.key,
        ratio_to_torch_fused_adamw=median,
        ratio_q1=q1,
        ratio_q3=q3,
        ns_per_param=pairs.quartiles(own)[1] / parameters * 1e9,
        fused_ns_per_param=pairs.quartiles(fused)[1] / parameters * 1e9,
        rounds=len(own),
        copy_gb_s=copy,
    )


def ratio(own: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Quartiles of the ratios of neighbours in time, round by round."""
    return pairs.quartiles([a / b for a, b in zip(own, theirs, strict=True)])


def state_bytes(optimizer: torch.optim.Optimizer, params: list[Parameter]) -> int:
    """Bytes that the optimizer keeps, step counters included: every storage that its state reaches, counted once."""
    storages: dict[int, int] = {}

    def reach(value: Any) -> None:
        if flatten := getattr(value, "__tensor_flatten__", None):  # several tensors behind the face of one
            for name in flatten()[0]:
                reach(getattr(value, name))
        elif isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for entry in value.values():
                reach(entry)
        elif isinstance(value, (list, tuple)):
            for entry in value:
                reach(entry)

    reach(dict(optimizer.state))
    theirs = {t.untyped_storage().data_ptr() for p in params for t in (p, p.grad) if t is not None}
    return sum(size for pointer, size in storages.items() if pointer not in theirs)


def trajectory_error(row: Row, exact: Row, steps: int = 100) -> float:
    """`||d - d_exact|| / ||d_exact||` of the displacements d over `steps` steps with the same gradients."""
    params, others = lists.make("trajectory"), lists.make("trajectory")
    start = [p.detach().clone() for p in params]
    optimizer, reference = row.make(params), exact.make(others)
    for grads in lists.gradients(params, steps):
        for p, other, grad in zip(params, others, grads, strict=True):
            p.grad, other.grad = grad, grad.clone()
        optimizer.step()
        reference.step()
    apart = math.fsum((p.double() - q.double()).square().sum().item() for p, q in zip(params, others, strict=True))
    moved = math.fsum((q.double() - s.double()).square().sum().item() for q, s in zip(others, start, strict=True))
    return math.sqrt(apart / moved)


@torch.no_grad()
def orthogonality(one: Contender) -> dict[str, float] | None:
    """How far the update of the first step, just taken, is from orthogonal; the worst of one matrix of each shape.

    The first momentum is a multiple of the gradient, so `x <- x - lr (s O + weight_decay x)` gives `O`, to be held against the
    polar factor of the gradient. `s = sqrt(max(1, rows / columns))`, which poise, torch and pytorch_optimizer share by default;
    None for others.
    """
    if one.row.library not in ("poise", "torch", "pytorch_optimizer"):
        return None
    try:
        from poise.linalg.orthogonality import orthogonalization_error
    except ImportError:
        return None
    group = one.optimizer.param_groups[0]
    lr, weight_decay = float(group["lr"]), float(group["weight_decay"])
    found: dict[tuple[int, ...], tuple[float, float, float]] = {}
    for before, p, grad in zip(lists.make(one.row.params, one.row.dtype), one.params, one.grads, strict=True):
        rows, columns = p.shape
        if (rows, columns) not in found:
            update = (before * (1 - lr * weight_decay) - p) / (lr * math.sqrt(max(1.0, rows / columns)))
            error = orthogonalization_error(grad, update)
            found[rows, columns] = (error.frobenius.item(), error.sigma_min.item(), error.sigma_max.item())
    relative, smallest, largest = zip(*found.values(), strict=True)
    return {"relative": max(relative), "sigma_min": min(smallest), "sigma_max": max(largest)}


def _matrix_dtype() -> torch.dtype:
    """The precision in which this machine multiplies matrices fastest."""
    try:
        from poise.linalg.polar import fast_bfloat16
    except ImportError:
        return torch.float32
    return torch.bfloat16 if fast_bfloat16("cpu") else torch.float32


def _kernels(row: Row) -> int | None:
    """Native kernels that poise has made or loaded in this process so far."""
    if row.library != "poise":
        return None
    from poise.optim.engine import kernels

    return kernels.compiled_count()


def _version(library: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(library)
    return getattr(__import__(library), "__version__", None)


if __name__ == "__main__":
    main()
