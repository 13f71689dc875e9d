"""Lion: the sign of an interpolated momentum."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from poise.catalog import Paper, log_uniform, method

from ..optimizer import Optimizer
from ..options import Options
from ..routing import Params
from ..transform import Context, Param, State
from ..transforms.momentum import interpolated
from ..transforms.step import Decay


class lion(interpolated):
    """Lion's direction: `c = b1 m + (1 - b1) u`, result `sign(c)`; then `m <- b2 m + (1 - b2) u`, with the other beta.

    Args:
        betas: `(b1, b2)`, each in [0, 1).
    """

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        c = super().update(u, state, x, k)
        return torch.sign(c)

    def update_rms(self, p: Param) -> float:
        return 1.0


@method(
    "lion",
    family="optim",
    paper=Paper("Symbolic Discovery of Optimization Algorithms", arxiv="2302.06675", year=2023),
    tune={"lr": log_uniform(1e-5, 1e-2), "weight_decay": log_uniform(1e-3, 3.0)},
    mutant=("torch.sign(c)", "c"),
)
class Lion(Optimizer):
    """Sign momentum with one buffer.

        c  = b1 m + (1 - b1) g
        x <- x - lr * ( sign(c) + weight_decay * x )
        m <- b2 m + (1 - b2) g

    Args:
        lr: 1e-4; 3 to 10 times smaller than AdamW's, since every entry moves by lr.
        betas: (0.9, 0.99); (0.95, 0.98) for unstable language-model runs.
        weight_decay: 0; 3 to 10 times larger than AdamW's, which keeps lr * weight_decay.
        options: see `Optimizer`.

    State: 1 value per element. Source: "Symbolic Discovery of Optimization Algorithms" (arXiv 2302.06675).
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        decay: Decay = "coupled",
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lion(betas), lr, weight_decay, decay, **options)
