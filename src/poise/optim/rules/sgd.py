"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from poise.catalog import Paper, log_uniform, method, uniform

from ..optimizer import Optimizer
from ..options import Options
from ..routing import Params
from ..transform import chain
from ..transforms.momentum import momentum as momentum_link
from ..transforms.step import Decay, identity


@method(
    "sgd",
    family="optim",
    paper=Paper("On the importance of initialization and momentum in deep learning", year=2013),
    tune={"lr": log_uniform(1e-3, 1.0), "momentum": uniform(0.0, 0.99), "weight_decay": log_uniform(1e-6, 1e-2)},
    mutant=("momentum_link(momentum, nesterov, dampening)", "momentum_link(momentum, False, dampening)"),
)
class SGD(Optimizer):
    """Gradient descent with heavy-ball or Nesterov momentum.

    With `g` the gradient (plus `weight_decay * x` under decay="l2") and `buf_0 = 0`:

        buf <- momentum * buf + (1 - dampening) * g        (the first step adds g whole)
        u    = g + momentum * buf if nesterov else buf
        x   <- x - lr * u

    Args:
        lr: 1e-3, as in torch.optim.SGD.
        momentum: 0 turns it off, and no buffer is kept.
        decay: "l2" adds the decay to the gradient, as torch.optim.SGD does; "coupled" and "independent" decouple it (SGDW of
            "Decoupled Weight Decay Regularization", arXiv 1711.05101).
        options: see `Optimizer`.

    Source: Sutskever, Martens, Dahl, Hinton, ICML 2013; the conventions are those of torch.optim.SGD.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        decay: Decay = "l2",
        **options: Unpack[Options],
    ) -> None:
        rule = momentum_link(momentum, nesterov, dampening) if momentum or nesterov else identity()
        super().__init__(params, chain(rule), lr, weight_decay, decay, **options)
