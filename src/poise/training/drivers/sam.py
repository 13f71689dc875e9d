"""SAM: the gradient where the loss nearby is worst."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from poise.catalog import Paper, log_uniform, method

from .. import weights
from ..driver import Driver
from ..passes import Passes

TINY = 1e-12  # added to the norm


@method(
    "sam",
    family="training",
    kind="driver",
    paper=Paper("Sharpness-Aware Minimization for Efficiently Improving Generalization", arxiv="2010.01412", year=2020),
    tune={"rho": log_uniform(1e-3, 1.0)},
    mutant=("1.0 / (weights.norm(self.gradients()) + TINY)", "1.0"),
)
class SAM(Driver):
    """The inner optimizer, fed with the gradient at a point `rho` uphill.

    With the gradient g of one batch, over all parameters together:

        y = x + rho g(x) / (||g(x)|| + 1e-12)
        x <- one step of the inner optimizer from x, with g(y)

    Both gradients are of the same batch, and of the same function: torch's random numbers are drawn again for the second pass,
    and the buffers of `model` are left as the first one made them. The weights come back bit for bit, so that rho = 0 is the
    inner optimizer. Two passes a step. Under DistributedDataParallel the gradient is that of the global batch.

    Args:
        opt: any optimizer that takes gradients as they are; not one that calls a closure itself, such as LBFGS.
        rho: 0.05, per group: 0 leaves a group where it is.
        model: whose buffers (batch statistics) only the first pass may change. None: there are none.

    A bfloat16 weight is displaced with stochastic rounding: to nearest, most displacements would vanish.
    State: none; a copy of the weights during a step. Source: "Sharpness-Aware Minimization for Efficiently Improving
    Generalization" (arXiv 2010.01412).
    """

    needs_closure = True
    gives_gradients = True

    def __init__(self, opt: torch.optim.Optimizer, rho: float = 0.05, *, model: nn.Module | None = None) -> None:
        if not rho >= 0.0:
            raise ValueError(f"rho={rho}: must not be negative")
        self.model = model
        super().__init__(opt, {"rho": rho}, own={"step": 0})

    def drive(self, closure: Callable[[], Any] | None) -> Any:
        assert closure is not None
        passes = Passes(self, closure, self.model)
        loss = passes.here()
        self.ascend(passes, self.scale())
        self.inner_step(lambda: loss)
        return loss

    def scale(self) -> Tensor | float:
        """What makes the gradients that stand in the parameters, taken together, a direction."""
        return 1.0 / (weights.norm(self.gradients()) + TINY)

    def ascend(self, passes: Passes, scale: Tensor | float) -> None:
        """Replace the gradients by those at the weights plus `rho * scale` times the gradients."""
        self.own["step"] += 1
        passes.elsewhere(passes.closure, self._moves(scale), key=self.own["step"])

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters() if p.grad is not None]

    def _moves(self, scale: Tensor | float) -> Iterator[Tensor | None]:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    yield None
                    continue
                gradient = weights.local(p.grad).to(weights.computing(p.dtype))
                yield gradient * (self.hyper(group, "rho") * (scale.to(gradient) if isinstance(scale, Tensor) else scale))
