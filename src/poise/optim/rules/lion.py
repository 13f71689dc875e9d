"""Lion: the sign of an interpolated momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor

from poise.catalog import Paper, log_uniform, method

from ..optimizer import Optimizer
from ..options import Options
from ..routing import Params
from ..transform import Context, Param, Slot, State, Transform
from ..transforms.adaptive import check_betas
from ..transforms.step import Decay


class lion(Transform):
    """Lion's direction: `c = b1 m + (1 - b1) u`, result `sign(c)`; then `m <- b2 m + (1 - b2) u`, with the other beta.

    Args:
        betas: `(b1, b2)`, each in [0, 1).
    """

    def __init__(self, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        check_betas(betas)
        self.defaults = {"betas": tuple(betas)}

    def slots(self, p: Param) -> dict[str, Slot]:
        return {"exp_avg": Slot(tuple(p.shape))}

    def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float]:
        b1, b2 = map(float, hyper["betas"])
        return {"b1": b1, "c1": 1 - b1, "b2": b2, "c2": 1 - b2}

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        m = state["exp_avg"]
        c = k.b1 * m + k.c1 * u
        state["exp_avg"] = k.b2 * m + k.c2 * u
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
