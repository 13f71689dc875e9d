"""Muon: momentum, orthogonalized."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from poise.catalog import Paper, log_uniform, method

from ..optimizer import Optimizer
from ..options import Options
from ..routing import Params
from ..skeleton import AdamWRest
from ..transform import chain
from ..transforms.momentum import momentum as momentum_link
from ..transforms.spectral import ScaleRule, orthogonalize, shape_scale
from ..transforms.step import Decay


@method(
    "muon",
    family="optim",
    paper=Paper(
        "Muon: An optimizer for hidden layers in neural networks", year=2024, url="https://kellerjordan.github.io/posts/muon/"
    ),
    tune={"lr": log_uniform(2e-3, 0.2), "adamw_lr": log_uniform(1e-4, 3e-2), "weight_decay": log_uniform(1e-3, 1.0)},
    mutant=("shape_scale(scale_rule)", 'shape_scale("none")'),
)
class Muon(Optimizer):
    """Momentum whose matrices are replaced by (nearly) the closest orthogonal ones; AdamW for everything else.

    For each hidden matrix `W` (rows = outputs; a convolution as (out, in * kernel), each of stacked experts and each part of a
    fused q, k, v on its own):

        buf <- mu buf + (1 - mu) G
        M    = (1 - mu) G + mu buf  with nesterov, else buf
        W   <- W - lr * ( s * polar(M) + weight_decay * W )

    Embeddings, output heads, norms, biases and vectors go to AdamW, in groups of their own with their own learning rate.

    Args:
        lr: 0.02, of the matrices.
        momentum, nesterov: 0.95, with look-ahead.
        weight_decay: 0.
        method, steps: how polar(M) is found, and in how many iterations; see `poise.linalg.polar`. "polar_express" comes closer
            in five steps than the release's "ns5".
        scale_rule: `s`: "original" sqrt(max(1, rows/columns)); "match_rms" 0.2 sqrt(max(rows, columns)), with which AdamW's lr
            and weight_decay carry over ("Muon is Scalable for LLM Training", arXiv 2502.16982); "spectral"
            sqrt(rows/columns); "none".
        adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay: of the rest: 3e-4, (0.9, 0.95), 1e-10, 0, as in the release.
        options: see `Optimizer`.

    State: 1 value per element of the matrices, 2 of the rest. Source: K. Jordan et al., 2024 (post and released code). Unlike
    the release: the scale of a convolution comes from its 2-D view, the caller's `.grad` is never written to, and a parameter
    without gradient is left alone.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        *,
        method: str = "polar_express",
        steps: int | None = None,
        scale_rule: ScaleRule = "original",
        adamw_lr: float | Tensor = 3e-4,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-10,
        adamw_weight_decay: float = 0.0,
        decay: Decay = "coupled",
        **options: Unpack[Options],
    ) -> None:
        spectral = chain(momentum_link(momentum, nesterov, average=True), orthogonalize(method, steps), shape_scale(scale_rule))
        rest = AdamWRest(adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay)
        routes = rest.beside("muon", spectral, lr, weight_decay)
        super().__init__(params, routes, lr, weight_decay, decay, **options)
