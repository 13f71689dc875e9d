"""One run: an entry with given hyper-parameters, from fresh weights to the end of its schedule."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from poise.catalog import Method
from poise.compare import randomness
from poise.compare.entries import Entry, as_entry
from poise.compare.loop import Loop
from poise.compare.results import Run
from poise.compare.tasks import Split, Task


def train(
    task: Task,
    entry: Entry | Method,
    hyper: Mapping[str, Any],
    *,
    number: int,
    seed: int,
    passes: int,
    split: Split,
    device: str = "cpu",
    advance: Callable[[int], None] = lambda done: None,
) -> Run:
    """Train for `passes` forward and backward passes, then measure the loss on `split`. A hopeless run is not finished.

    Args:
        number: written into the result.
        advance: told after every step how many passes it took.
    """
    started, entry = time.perf_counter(), as_entry(entry)
    with randomness.own(seed, device):
        loop = Loop(task, lambda model: entry.build(model, task, **hyper), seed=seed, passes=passes, device=device)
        while not loop.finished and not loop.hopeless:
            advance(loop.step())
        loss = loop.evaluate(split)
    return Run(
        number=number,
        seed=seed,
        hyper=dict(hyper),
        passes=loop.done,
        loss=finite(loss),
        initial_loss=finite(loop.losses[0]),
        diverged=not math.isfinite(loss),
        curve=loop.curve(),
        parameters=sum(p.numel() for p in loop.model.parameters()),
        trainable=sum(p.numel() for p in loop.model.parameters() if p.requires_grad),
        state_bytes=state_bytes(loop.optimizer),
        seconds=time.perf_counter() - started,
    )


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
