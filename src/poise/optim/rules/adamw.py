"""AdamW: Adam with decoupled weight decay."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from poise.catalog import Paper, choice, log_uniform, method

from ..optimizer import Optimizer
from ..options import Options
from ..routing import Params
from ..transforms.adaptive import adam
from ..transforms.step import Decay


@method(
    "adamw",
    family="optim",
    paper=Paper("Decoupled Weight Decay Regularization", arxiv="1711.05101", year=2019),
    tune={
        "lr": log_uniform(1e-4, 3e-2),
        "weight_decay": log_uniform(1e-3, 1.0),
        "betas": choice((0.9, 0.95), (0.9, 0.99), (0.9, 0.999)),
    },
    mutant=("adam(betas, eps)", "adam((betas[1], betas[0]), eps)"),
)
class AdamW(Optimizer):
    """Adam whose weight decay does not pass through the gradient's statistics.

        m <- b1 m + (1 - b1) g
        v <- b2 v + (1 - b2) g^2
        x <- x - lr * ( (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay * x )

    Args:
        lr: 1e-3.
        betas: (0.9, 0.999). eps: 1e-8, added to the root after bias correction (the authors' Lua code adds it before; PyTorch
            and the paper after).
        weight_decay: 1e-2.
        decay: "coupled" multiplies it by lr (PyTorch); "independent" by the schedule's multiplier only (the paper).
        options: see `Optimizer`.

    State: 2 values per element. Source: "Decoupled Weight Decay Regularization" (arXiv 1711.05101).
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        decay: Decay = "coupled",
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, adam(betas, eps), lr, weight_decay, decay, **options)
