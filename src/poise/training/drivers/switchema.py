"""Switch EMA: now and then the training goes on from its own average."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from poise.catalog import Paper, choice, log_uniform, method

from .. import weights
from .ema import EMA, Warmup


@method(
    "switch-ema",
    family="training",
    kind="driver",
    paper=Paper("Switch EMA: A Free Lunch for Better Flatness and Sharpness", arxiv="2402.09240", year=2024),
    tune={"p": log_uniform(1e-3, 1.0), "switch_every": choice(1, 10, 30, 100)},
    mutant=("done % self.switch_every == 0", "(done + 1) % self.switch_every == 0"),
)
class SwitchEMA(EMA):
    """An EMA of the weights to which the weights are set once an epoch.

    After each step of the inner optimizer, with `e_0 = x_0`:

        e <- (1 - p_t) e + p_t x
        x <- e                      after every `switch_every` steps; the shadow and the optimizer's state stay as they are

    Evaluate and export inside `with opt.evaluating():`, where the model holds e.

    Args:
        opt, model, p, every, warmup, horizon: see `EMA`.
        switch_every: steps between two switches, an epoch in the paper: `len(loader)`. None: only when you call `switch()`.
        switch_start: no switch in this many first steps.

    State: see `EMA`. Source: "Switch EMA: A Free Lunch for Better Flatness and Sharpness" (arXiv 2402.09240). The released hook
    has switching turned off and an interval of 100 by default; the paper switches after every epoch, and so does this.
    """

    def __init__(
        self,
        opt: torch.optim.Optimizer,
        model: nn.Module | None = None,
        p: float = 2e-4,
        *,
        switch_every: int | None,
        switch_start: int = 0,
        every: int = 1,
        warmup: Warmup = "none",
        horizon: int | None = None,
    ) -> None:
        if switch_every is not None and switch_every < 1:
            raise ValueError(f"switch_every={switch_every}: must be at least 1, or None for switches by hand")
        if switch_start < 0:
            raise ValueError(f"switch_start={switch_start}: must not be negative")
        self.switch_every, self.switch_start = switch_every, switch_start
        super().__init__(opt, model, p, every=every, warmup=warmup, horizon=horizon)

    def drive(self, closure: Callable[[], Any] | None) -> Any:
        loss = super().drive(closure)
        done = self.own["step"]
        if self.switch_every is not None and done > self.switch_start and done % self.switch_every == 0:
            self.switch()
        return loss

    @torch.no_grad()
    def switch(self) -> None:
        """Set the weights, and the model's floating-point buffers, to their averages."""
        if self._shown:
            raise RuntimeError("switch() inside `with evaluating()`: the weights there are the averaged ones, for a while")
        for p, shadow in zip(self.parameters(), self.own["weights"], strict=True):
            weights.write(self, p, shadow)
        for buffer, shadow in zip(self.buffers(), self.own["buffers"], strict=True):
            buffer.copy_(shadow)
