"""USAM and DNSAM: SAM without its normalisation, and with that of the whole objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from poise.catalog import Paper, log_uniform, method

from ..passes import Passes
from .sam import SAM

PAPER = Paper("An SDE for Modeling SAM: Theory and Insights", arxiv="2301.08203", year=2023)


@method(
    "usam",
    family="training",
    kind="driver",
    paper=PAPER,
    tune={"rho": log_uniform(1e-4, 1.0)},
    mutant=("return 1.0  # not normalised", "return 0.5"),
)
class USAM(SAM):
    """SAM with an ascent as long as the gradient is: unnormalised.

        y = x + rho g(x)
        x <- one step of the inner optimizer from x, with g(y)

    With SGD this models gradient descent on `f + rho/2 E||g||^2`. On a quadratic it shrinks the coordinate of curvature h by
    `1 - lr (h + rho h^2)`: a saddle with curvature -h attracts it as soon as rho > 1/h.

    Args:
        opt, rho, model: see `SAM`; rho is a length per length of gradient here, 0.05.

    State: none. Source: "An SDE for Modeling SAM: Theory and Insights" (arXiv 2301.08203); `docs/drivers.md` simulates its
    stochastic differential equation.
    """

    def scale(self) -> Tensor | float:
        return 1.0  # not normalised


@method(
    "dnsam",
    family="training",
    kind="driver",
    paper=PAPER,
    tune={"rho": log_uniform(1e-3, 1.0)},
    mutant=("passes.elsewhere(self.full, replay=False)", "passes.elsewhere(passes.closure, replay=False)"),
)
class DNSAM(SAM):
    """SAM normalised by the gradient of the whole objective, a tool of analysis.

        y = x + rho g(x) / (||grad f(x)|| + 1e-12)
        x <- one step of the inner optimizer from x, with g(y)

    With SGD this models gradient descent on `f + rho ||grad f||`. Three passes a step, one of them over all data.

    Args:
        opt, rho, model: see `SAM`.
        full: as the closure of `step`, for f: clears the gradients, computes the loss over all data, calls backward.

    State: none. Source: "An SDE for Modeling SAM: Theory and Insights" (arXiv 2301.08203).
    """

    def __init__(
        self, opt: torch.optim.Optimizer, full: Callable[[], Any], rho: float = 0.05, *, model: nn.Module | None = None
    ) -> None:
        if not callable(full):
            raise TypeError(f"full={full!r}: must be a function that takes the gradient over all data")
        self.full = full
        super().__init__(opt, rho, model=model)

    def drive(self, closure: Callable[[], Any] | None) -> Any:
        assert closure is not None
        passes = Passes(self, closure, self.model)
        passes.elsewhere(self.full, replay=False)
        scale = self.scale()
        self.zero_grad()
        loss = passes.here()
        self.ascend(passes, scale)
        self.inner_step(lambda: loss)
        return loss
