"""Turbo-Muon: Muon whose orthogonalization starts from rows of almost equal length, and so needs a step less."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from poise.catalog import Paper, log_uniform, method

from ..options import Options
from ..routing import Params
from ..transforms.spectral import ScaleRule
from ..transforms.step import Decay
from .muon import Muon


@method(
    "turbo-muon",
    family="optim",
    paper=Paper(
        "Turbo-Muon: Accelerating Orthogonality-Based Optimization with Pre-Conditioning", arxiv="2512.04632", year=2025
    ),
    tune={"lr": log_uniform(2e-3, 0.2), "adamw_lr": log_uniform(1e-4, 3e-2), "weight_decay": log_uniform(1e-3, 1.0)},
    mutant=('method="turbo4"', 'method="dyn5"'),
)
class TurboMuon(Muon):
    """Muon with four Newton-Schulz steps on a scaled start in the place of five; AdamW for everything but hidden matrices.

    As `Muon`, with polar(M) found from (transposed so that rows are not more than columns)

        A = M M^T;   s_i = (sum_j |A_ij|)^(-1/2);   X <- diag(s) M,   A <- diag(s) A diag(s)

    by the last `steps` of five polynomials `X <- a X + (b A + c A^2) X`, the first of which takes the scaled A. No singular
    value of the scaled X exceeds 1, and few are small, so the aggressive first polynomial is not needed. The scaling turns the
    result a little: it does not tend to polar(M) with more steps.

    Args:
        steps: 4. 5 adds the first polynomial; beyond, the last is repeated.
        others: as of `Muon`.
        options: see `Optimizer`.

    State: 1 value per element of the matrices, 2 of the rest. Source: "Turbo-Muon: Accelerating Orthogonality-Based
    Optimization with Pre-Conditioning" (arXiv 2512.04632), with the polynomials of its released code; an earlier release had
    others, which do equally well. Unlike it, s has no floor, under which short rows would not be scaled.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        *,
        steps: int | None = None,
        scale_rule: ScaleRule = "original",
        adamw_lr: float | Tensor = 3e-4,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-10,
        adamw_weight_decay: float = 0.0,
        decay: Decay = "coupled",
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params, lr, momentum, nesterov, weight_decay, method="turbo4", steps=steps, scale_rule=scale_rule,
            adamw_lr=adamw_lr, adamw_betas=adamw_betas, adamw_eps=adamw_eps, adamw_weight_decay=adamw_weight_decay,
            decay=decay, **options,
        )  # fmt: skip
