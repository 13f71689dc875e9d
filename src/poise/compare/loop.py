"""The training loop that comparisons and `poise train` share: a task, a method, a schedule that is finished."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from poise.adapt import attached
from poise.compare import randomness
from poise.compare.tasks import Split, Task
from poise.training import LayerMeans, captures
from poise.training.curvature import hutchinson, reads_hessian

WARMUP = 0.1  # share of the run
CURVE_POINTS = 50
ESTIMATE_EVERY, ESTIMATE_PASSES = 10, 2  # steps between two estimates of a Hessian; each is a pass, and one more backward pass
HOPELESS = 2.0  # times the initial loss; what ends a little above it has not diverged, it has learned nothing


class Loop:
    """Trains a fresh `task.model()` for `passes` forward and backward passes, one optimizer step at a time.

    Initial weights and the order of the data hang on `seed` alone, so runs of two methods with one seed are a pair. A step that
    calls its closure twice pays for two passes, and its schedule with it. A rule that may be fed the Hessian gets Hutchinson's
    estimate of it on the batch at hand in every tenth step, and pays for that too.

    Args:
        build: makes the optimizer of a model.
        seed: of the order of the data; for the initial weights it must also be that of torch's generator, see `randomness`.
    """

    def __init__(
        self, task: Task, build: Callable[[nn.Module], Optimizer], *, seed: int, passes: int, device: str = "cpu"
    ) -> None:
        self.task, self.seed, self.passes, self.device = task, seed, passes, device
        self.model = task.model().to(device)
        self.optimizer = build(self.model)
        kept = attached(self.model)
        self.prepared = kept.passes if kept is not None else 0  # passes that an adapter took to look at gradients first
        if captures.wanted(self.optimizer):
            LayerMeans(self.model, self.optimizer)
        self.done = self.prepared  # passes taken
        self.losses: list[float] = []  # of each step's first pass
        self.taken: list[int] = []  # passes of each step
        self.inside = 0.0  # seconds of the last step spent in its passes
        self.finite = True
        self.schedule = LambdaLR(self.optimizer, lambda _: warmup_then_decay(self.done, passes))
        self.stream = task.batches("train", seed)
        self.model.train()

    @property
    def finished(self) -> bool:
        return self.done >= self.passes

    def step(self) -> int:
        """Take one step; returns how many passes it took.

        Raises:
            RuntimeError: if the optimizer takes a step without a forward pass.
        """
        batch = move(next(self.stream), self.device)
        found: list[float] = []
        self.inside = 0.0

        def closure() -> Tensor:
            started = time.perf_counter()
            self.optimizer.zero_grad()
            loss = self.task.loss(self.model, batch)
            loss.backward()
            found.append(float(loss.detach()))  # on a GPU this waits, so that the seconds are those of the work
            self.inside += time.perf_counter() - started
            return loss

        extra = self._estimate(batch)
        self.optimizer.step(closure)  # pyright: ignore[reportCallIssue, reportArgumentType]
        if not found:
            name = type(self.optimizer).__name__
            raise RuntimeError(f"{name} took a step without calling its closure: there is no pass to count")
        self.losses.append(found[0])
        self.taken.append(len(found) + extra)
        self.done += self.taken[-1]
        self.finite = all(map(math.isfinite, found))
        self.schedule.step()
        return self.taken[-1]

    def _estimate(self, batch: Any) -> int:
        """Feed an estimate of the Hessian where it is wanted; returns the passes that took."""
        base: Any = getattr(self.optimizer, "base", self.optimizer)
        steps = len(self.taken)
        if not steps or steps % ESTIMATE_EVERY or not reads_hessian(base):
            return 0
        base.feed(hessian=hutchinson(self.model, lambda: self.task.loss(self.model, batch), seed=steps))
        return ESTIMATE_PASSES

    @property
    def hopeless(self) -> bool:
        """Whether nothing good can come any more: a loss is not finite, or the last ones are far above the first ones.

        Single batches stray, so it is the mean over a twentieth of the run that must be above the largest of the warm-up.
        """
        if not self.finite:
            return True
        window = min(max(5, self.passes // 20), 50)
        if self.done <= WARMUP * self.passes + window or len(self.losses) < window:
            return False
        return far_above(statistics.fmean(self.losses[-window:]), max(self.losses[: max(1, round(WARMUP * self.passes))]))

    def evaluate(self, split: Split) -> float:
        """Mean loss over the split's batches; nan for a run that is hopeless, or that ends far above where it began."""
        if self.hopeless:
            return math.nan
        with self.evaluating():
            loss = evaluate(self.task, self.model, split, self.seed, self.device)
        if not far_above(loss, self.losses[0]):
            return loss
        with randomness.own(self.seed, self.device):  # the first batch may have been an easy one: ask the model it began with
            first = evaluate(self.task, self.task.model().to(self.device), split, self.seed, self.device)
        return math.nan if far_above(loss, first) else loss

    def evaluating(self) -> AbstractContextManager[None]:
        """Within it, the model holds the weights that count: of a driver that keeps an average, the average."""
        shown = getattr(self.optimizer, "evaluating", None)
        return shown() if callable(shown) else nullcontext()  # pyright: ignore[reportReturnType]

    def curve(self) -> list[tuple[int, float]]:
        """(passes, mean training loss since the point before), in about `CURVE_POINTS` points."""
        points: list[tuple[int, float]] = []
        recent: list[float] = []
        at = 0
        for loss, passes in zip(self.losses, self.taken, strict=True):
            if not math.isfinite(loss):
                break
            at += passes
            recent.append(loss)
            if at - (points[-1][0] if points else 0) >= self.passes / CURVE_POINTS or at >= self.passes:
                points.append((at, statistics.fmean(recent)))
                recent = []
        return points


def far_above(loss: float, first: float) -> bool:
    """Whether a loss of `first` has become one that only divergence explains; true for nan."""
    return not loss <= first + (HOPELESS - 1) * abs(first)


def warmup_then_decay(done: int, passes: int) -> float:
    """Factor on the learning rate: linear to 1 over the first tenth, then linear to 1/n of it at the last step.

    Linear decay to zero has nothing to tune, and came out best among the schedules of Straight to Zero (arXiv 2502.15938).
    """
    warmup = max(1, round(WARMUP * passes))
    return max(0.0, min((done + 1) / warmup, (passes - done) / max(1, passes - warmup), 1.0))


@torch.no_grad()
def evaluate(task: Task, model: nn.Module, split: Split, seed: int, device: str = "cpu") -> float:
    """Mean loss over the split's batches. The model is left as it was found, in training or not."""
    training = model.training
    model.eval()
    found = statistics.fmean(float(task.loss(model, move(batch, device))) for batch in task.batches(split, seed))
    model.train(training)
    return found


def move(batch: Any, device: str) -> Any:
    """`batch` with every tensor in it, inside tuples, lists and mappings, on `device`."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: move(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        moved = [move(value, device) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch
