"""Delayed gradients: what an asynchronous or pipelined training would do to an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from poise.catalog import Paper, choice, method

from .. import weights
from ..driver import Driver


@method(
    "delayed",
    family="training",
    kind="driver",
    paper=Paper("Adaptive Braking for Mitigating Gradient Delay", arxiv="2007.01397", year=2020),
    tune={"delay": choice(1, 4, 16)},
    mutant=("steps % self.delay", "steps % max(1, self.delay - 1)"),
)
class Delayed(Driver):
    """Simulates delay: the gradient that is applied at step t was computed D steps before.

        g_t = grad f(x_t)
        x_{t+1} = step of the inner optimizer on g_{t-D};   nothing moves for t < D

    Gradients wait in a queue of length D. This is what D stages of a pipeline, or D workers that take turns, do to an
    optimizer: it shows what that costs, and what helps against it, in one process. With D = 0 nothing is changed.

    Args:
        opt: the optimizer that gets the old gradients.
        delay: D, constant.

    Raises:
        ValueError: if `delay` is negative or no whole number.

    Called with a closure or without one; the loss returned is that of the weights at hand. A parameter that had no gradient
    D steps ago has none now. State: D values per parameter. The gradients in `.grad` are those at hand again after the step.

    Source: the delay simulator of "Adaptive Braking for Mitigating Gradient Delay" (arXiv 2007.01397).
    """

    gives_gradients = True

    def __init__(self, opt: torch.optim.Optimizer, delay: int = 1) -> None:
        if isinstance(delay, bool) or not isinstance(delay, int) or delay < 0:
            raise ValueError(f"delay={delay!r}: must be a whole number of at least 0")
        self.delay = delay
        # had: by parameter, which of the D places hold a gradient; a tensor for each place is there from the beginning
        super().__init__(opt, own={"step": 0, "queue": [], "had": []})

    def adopt(self, params: Sequence[Tensor]) -> None:
        for p in params:
            self.own["queue"].append([torch.zeros_like(weights.local(p)) for _ in range(self.delay)])
            self.own["had"].append([0] * self.delay)

    def drive(self, closure: Callable[[], Any] | None) -> Any:
        if self.delay == 0:
            return self.inner_step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params, steps = self.parameters(), self.own["step"]
        place = steps % self.delay
        fresh = [p.grad for p in params]
        for i, (p, grad) in enumerate(zip(params, fresh, strict=True)):
            kept, had = self.own["queue"][i], self.own["had"][i]
            old = None
            if had[place] and grad is not None:
                old = grad.clone()
                weights.local(old).copy_(kept[place])
            elif had[place]:
                old = torch.zeros_like(p)
                weights.local(old).copy_(kept[place])
            if grad is not None:
                kept[place] = weights.local(grad).detach().to(kept[place]).clone()
            had[place] = int(grad is not None)
            p.grad = old
        try:
            self.inner_step(None)  # in the first D steps without any gradient: nothing moves, but hooks and schedulers see it
        finally:
            for p, grad in zip(params, fresh, strict=True):
                p.grad = grad
        self.own["step"] = steps + 1
        return loss
