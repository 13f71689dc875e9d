"""EMA: evaluate an exponential moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from poise.catalog import Paper, log_uniform, method

from .. import weights
from ..driver import Driver

Warmup = Literal["none", "exponential", "linear"]
HORIZON = {"none": 1, "exponential": 2000, "linear": 100}


@method(
    "ema",
    family="training",
    kind="driver",
    paper=Paper("Exponential Moving Average of Weights in Deep Learning: Dynamics and Benefits", arxiv="2411.18704", year=2024),
    tune={"p": log_uniform(1e-4, 0.5)},
    mutant=("lerp_(x.to(mine[i].dtype), share)", "lerp_(x.to(mine[i].dtype), 1 - share)"),
)
class EMA(Driver):
    """A shadow of the weights that follows them slowly, for evaluation and export; training does not see it.

    After each step of the inner optimizer, with `e_0 = x_0`:

        e <- (1 - p_t) e + p_t x

        with opt.evaluating():        # the model holds e in here, and x again afterwards, bit for bit
            validate(model)
            save(model)

    `model.state_dict()` outside is the training's, which is what a run resumes from together with `opt.state_dict()`.

    Args:
        opt: the optimizer that trains.
        model: its floating-point buffers (batch statistics) are averaged too; integer ones are left alone. None: weights only.
        p: 0.0002, a decay of 0.9998; the average looks back about 1/p steps, so short runs want more.
        every: take the weights in after every so many steps.
        warmup: how p_t comes down to p, so that the start is forgotten sooner, with t = 0 at the first step: "none";
            "exponential" p + (1 - p) exp(-(1 + t) / horizon); "linear" max(p, 0.1 (1 - p) (1 - t / horizon)).
        horizon: 2000 steps for "exponential", 100 for "linear".

    State: one value per parameter and buffer, in float32 also for weights of fewer bits, whose spacing an average would never
    cross. Source: "Exponential Moving Average of Weights in Deep Learning: Dynamics and Benefits" (arXiv 2411.18704); the
    default of p and the warm-ups are those of "Switch EMA" (arXiv 2402.09240) and its released code.
    """

    def __init__(
        self,
        opt: torch.optim.Optimizer,
        model: nn.Module | None = None,
        p: float = 2e-4,
        *,
        every: int = 1,
        warmup: Warmup = "none",
        horizon: int | None = None,
    ) -> None:
        if not 0.0 < p <= 1.0:
            raise ValueError(f"p={p}: must be in (0, 1]")
        if every < 1:
            raise ValueError(f"every={every}: must be at least 1")
        if warmup not in get_args(Warmup):
            raise ValueError(f"warmup={warmup!r}: must be one of {', '.join(map(repr, get_args(Warmup)))}")
        if horizon is not None and horizon < 1:
            raise ValueError(f"horizon={horizon}: must be at least 1")
        self.p, self.every, self.warmup, self.horizon = p, every, warmup, horizon or HORIZON[warmup]
        self.model, self._shown = model, False
        shadows = [b.detach().to(weights.computing(b.dtype), copy=True) for b in self.buffers()]
        super().__init__(opt, own={"step": 0, "weights": [], "buffers": shadows})

    def adopt(self, params: Sequence[Tensor]) -> None:
        self.own["weights"] += [weights.read(self.inner, p).clone() for p in params]

    def drive(self, closure: Callable[[], Any] | None) -> Any:
        if self._shown:
            raise RuntimeError(f"{type(self).__name__}.step() inside `with evaluating()`: the model holds the averaged weights")
        loss = self.inner_step(closure)
        t = self.own["step"]
        self.own["step"] = t + 1
        if (t + 1) % self.every == 0:
            self._average(self.share(t))
        return loss

    def share(self, t: int) -> float:
        """p_t, t steps after the first."""
        if self.warmup == "exponential":
            return self.p + (1 - self.p) * math.exp(-(1 + t) / self.horizon)
        if self.warmup == "linear":
            return max(self.p, 0.1 * (1 - self.p) * (1 - t / self.horizon))
        return self.p

    def buffers(self) -> list[Tensor]:
        """The model's floating-point buffers."""
        return [] if self.model is None else [b for b in self.model.buffers() if b.is_floating_point()]

    def _average(self, share: float) -> None:
        for mine, now in (
            (self.own["weights"], [weights.read(self, p) for p in self.parameters()]),
            (self.own["buffers"], self.buffers()),
        ):
            for i, x in enumerate(now):
                mine[i] = mine[i].to(x.device)  # the model may have moved since
                mine[i].lerp_(x.to(mine[i].dtype), share)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within it, the model holds the averaged weights and buffers.

        Raises:
            RuntimeError: if entered twice.
        """
        if self._shown:
            raise RuntimeError("evaluating() is entered already: the model holds the averaged weights")
        self._catch_up()
        targets = [*map(weights.local, self.parameters()), *self.buffers()]
        with torch.no_grad():
            kept = [t.clone() for t in targets]
        try:
            self._shown = True
            with torch.no_grad():
                for target, shadow in zip(targets, [*self.own["weights"], *self.own["buffers"]], strict=True):
                    target.copy_(shadow)
            yield
        finally:
            self._shown = False
            with torch.no_grad():
                for target, value in zip(targets, kept, strict=True):
                    target.copy_(value)
