"""One run: a method with given hyper-parameters, from fresh weights to the end of its schedule."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from poise.catalog import Method
from poise.compare.results import Run
from poise.compare.tasks import Split, Task

WARMUP = 0.1  # share of the run
CURVE_POINTS = 50


def train(
    task: Task,
    method: Method,
    hyper: dict[str, Any],
    *,
    number: int,
    seed: int,
    passes: int,
    split: Split,
    advance: Callable[[int], None] = lambda done: None,
) -> Run:
    """Train `task.model()` for `passes` forward and backward passes, then measure the loss on `split`.

    Initial weights and the order of the data hang on `seed` alone, so runs of two methods with one seed are a pair. A step that
    calls its closure twice pays for two passes, and its schedule with it. A run stops where its loss is not finite.

    Args:
        number: written into the result.
        advance: told after every step how many passes it took.

    Raises:
        RuntimeError: if the optimizer takes a step without a forward pass.
    """
    losses: list[float] = []  # of every pass
    seconds: list[tuple[float, float]] = []  # of every step: all of it, and its passes
    curve: list[tuple[int, float]] = []
    recent: list[float] = []  # losses before each step since the last point of the curve
    inside = 0.0

    def closure() -> Tensor:
        nonlocal inside
        started = time.perf_counter()
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()
        losses.append(float(loss.detach()))
        inside += time.perf_counter() - started
        return loss

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = task.model()
        optimizer = method.build(model, **hyper)
        schedule = LambdaLR(optimizer, lambda _: warmup_then_decay(len(losses), passes))
        stream = task.batches("train", seed)
        model.train()
        while len(losses) < passes:
            batch, before, inside = next(stream), len(losses), 0.0
            started = time.perf_counter()
            optimizer.step(closure)
            seconds.append((time.perf_counter() - started, inside))
            if len(losses) == before:
                raise RuntimeError(f"{method.name} took a step without calling its closure: there is no pass to count")
            schedule.step()
            advance(len(losses) - before)
            if not all(map(math.isfinite, losses[before:])):
                break
            recent.append(losses[before])
            since = len(losses) - (curve[-1][0] if curve else 0)
            if since >= passes / CURVE_POINTS or len(losses) >= passes:
                curve.append((len(losses), statistics.fmean(recent)))
                recent = []
        loss = evaluate(task, model, split, seed) if all(map(math.isfinite, losses)) else math.nan
    return Run(
        number=number,
        seed=seed,
        hyper=hyper,
        passes=len(losses),
        loss=finite(loss),
        initial_loss=finite(losses[0]),
        diverged=not loss <= losses[0],
        curve=curve,
        parameters=sum(p.numel() for p in model.parameters()),
        state_bytes=state_bytes(optimizer),
        seconds_per_step=statistics.median(total for total, _ in seconds),
        optimizer_seconds_per_step=statistics.median(total - inside for total, inside in seconds),
    )


def warmup_then_decay(done: int, passes: int) -> float:
    """Factor on the learning rate: linear to 1 over the first tenth, then linear to 1/n of it at the last step.

    Linear decay to zero has nothing to tune, and came out best among the schedules of Straight to Zero (arXiv 2502.15938).
    """
    warmup = max(1, round(WARMUP * passes))
    return max(0.0, min((done + 1) / warmup, (passes - done) / max(1, passes - warmup), 1.0))


@torch.no_grad()
def evaluate(task: Task, model: nn.Module, split: Split, seed: int) -> float:
    """Mean loss over the split's batches."""
    model.eval()
    return statistics.fmean(float(task.loss(model, batch)) for batch in task.batches(split, seed))


def finite(value: float) -> float | None:
    """JSON has no nan and no infinity."""
    return value if math.isfinite(value) else None


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of optimizer state, by its own account where it gives one: state kept in few bits is not always in `state`."""
    measured = getattr(optimizer, "state_bytes", None)
    if callable(measured):
        return int(measured())  # type: ignore[arg-type]
    return sum(t.numel() * t.element_size() for state in optimizer.state.values() for t in tensors(state.values()))


def tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    """The tensors among `values`, and those inside lists and dicts of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from tensors(value.values())
        elif isinstance(value, list | tuple):
            yield from tensors(value)
