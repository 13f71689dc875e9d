"""AuON and Hybrid-AuON: normalized momentum, divided by the RMS of its hyperbolic cosine."""

from __future__ import annotations

import math
from typing import Literal, Unpack, get_args

import torch
from torch import Tensor

from poise.catalog import Paper, log_uniform, method

from ..optimizer import Optimizer
from ..options import Options
from ..routing import Params
from ..skeleton import AdamWRest
from ..transform import Context, Param, State, Transform, chain
from ..transforms.momentum import momentum as momentum_link
from ..transforms.spectral import SCALES, by_matrix, matrices, orthogonalize, shape_factors
from ..transforms.step import Decay

Variant = Literal["unit", "raw"]

PAPER = Paper("AuON: A Linear-time Alternative to Semi-Orthogonal Momentum Updates", arxiv="2509.24320", year=2025)


class cosh_rms(Transform):
    """A matrix divided by the root mean square of the hyperbolic cosine of its normalized entries.

    With `U = M / (||M||_F + 1e-7)` and `R = sqrt(mean(cosh(gamma U)^2))` over all m x n entries:

        "unit":  u <- sqrt(max(1, m / n)) U / (R + 1e-8)
        "raw":   u <- M / (R + 1e-8)

    Each part of a fused projection is a matrix of its own.

    Args:
        variant: "unit" is the paper's, "raw" the authors' code's, which does not normalize what it divides.
        gamma: None: 1 for "unit", 1.5 for "raw".

    Raises:
        ValueError: for an unknown variant, or a gamma that is negative or not finite.
    """

    unit = "matrix"
    blind = True

    def __init__(self, variant: Variant = "unit", gamma: float | None = None) -> None:
        if variant not in get_args(Variant):
            raise ValueError(f"variant={variant!r}: must be one of {', '.join(map(repr, get_args(Variant)))}")
        if gamma is None:
            gamma = 1.0 if variant == "unit" else 1.5
        if not 0.0 <= gamma < math.inf:
            raise ValueError(f"gamma={gamma}: must be a finite number, not negative")
        self.variant: Variant = variant
        self.gamma = gamma

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return by_matrix(self._divided, k.param, u) if u.numel() else u

    def _divided(self, M: Tensor) -> Tensor:
        dims, (m, n) = (-2, -1), M.shape[-2:]
        over = torch.linalg.vector_norm(M, dim=dims, keepdim=True) + 1e-7
        doubled = (M * (2 * self.gamma / over)).exp_()  # 4 cosh(x)^2 = e^2x + e^-2x + 2
        total = doubled.sum(dims, keepdim=True) + doubled.reciprocal_().sum(dims, keepdim=True)
        R = (total / (m * n) + 2).sqrt() / 2 + 1e-8
        factor = 1 / R if self.variant == "raw" else SCALES["original"](m, n) / (over * R)
        return torch.mul(M, factor, out=doubled)

    def update_rms(self, p: Param) -> float | None:
        if self.variant == "raw":
            return None
        entries = sum(m * n for m, n in matrices(p))
        return math.sqrt(sum(s * s for s in shape_factors(p, "original")) / entries) if entries else None

    def __repr__(self) -> str:
        return f"cosh_rms({self.variant!r}, gamma={self.gamma})"


@method(
    "auon",
    family="optim",
    paper=PAPER,
    tune={"lr": log_uniform(0.01, 10.0), "adamw_lr": log_uniform(1e-4, 3e-2), "weight_decay": log_uniform(1e-5, 0.1)},
    mutant=("doubled.reciprocal_()", "doubled"),
)
class AuON(Optimizer):
    """Momentum normalized matrix by matrix and divided by the RMS of its cosh; AdamW for everything but hidden matrices.

    For each hidden matrix `W` (m rows = outputs, n columns; a convolution as (out, in * kernel), each of stacked experts and
    each part of a fused q, k, v on its own):

        buf <- mu buf + (1 - mu) G;   M = (1 - mu) G + mu buf
        U    = M / (||M||_F + 1e-7);  R = sqrt(mean(cosh(gamma U)^2))
        W   <- (1 - lr * weight_decay) W - lr * sqrt(max(1, m / n)) U / (R + 1e-8)     variant="unit"
        W   <- (1 - lr * weight_decay) W - lr * M / (R + 1e-8)                         variant="raw"

    R exceeds 1 by `gamma^2 / (2 m n)`, 2e-5 at 256 x 256: on matrices of real layers this is SGD with Nesterov momentum,
    normalized under "unit" and plain under "raw".

    Args:
        lr: 0.24, of the matrices: the length of a step of "unit", whatever the size of the matrix.
        momentum: mu, 0.95.
        weight_decay: 0. (The authors' training script has lr 0.08 and weight_decay 0.01.)
        variant: "unit", as the paper has it; "raw", as the authors' code has it.
        gamma: None: 1 for "unit", 1.5 for "raw".
        adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay: of the rest: 0.008, (0.8, 0.95), 1e-10, 0.
        options: see `Optimizer`.

    State: 1 value per element of the matrices, 2 of the rest. Source: "AuON: A Linear-time Alternative to Semi-Orthogonal
    Momentum Updates" (arXiv 2509.24320) and the authors' code, whose mu is the weight of the old buffer. Which of the two
    variants the published numbers are of is not known. Unlike the code, the caller's `.grad` is never written to.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 0.24,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        *,
        variant: Variant = "unit",
        gamma: float | None = None,
        adamw_lr: float | Tensor = 0.008,
        adamw_betas: tuple[float, float] = (0.8, 0.95),
        adamw_eps: float = 1e-10,
        adamw_weight_decay: float = 0.0,
        decay: Decay = "coupled",
        **options: Unpack[Options],
    ) -> None:
        rule = chain(momentum_link(momentum, nesterov=True, average=True), cosh_rms(variant, gamma))
        rest = AdamWRest(adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay)
        super().__init__(params, rest.beside("auon", rule, lr, weight_decay), lr, weight_decay, decay, **options)


@method(
    "hybrid-auon",
    family="optim",
    paper=PAPER,
    tune={"lr": log_uniform(0.01, 10.0), "adamw_lr": log_uniform(1e-4, 3e-2), "weight_decay": log_uniform(1e-5, 0.1)},
    mutant=(
        "orthogonalize(method, steps), cosh_rms(variant, gamma)",
        "cosh_rms(variant, gamma), orthogonalize(method, steps)",
    ),
)
class HybridAuON(Optimizer):
    """AuON of an orthogonalized momentum: with M replaced by (nearly) the closest orthogonal matrix first.

    As `AuON`, but with `orth(M)` in the place of M. "raw" is then Muon without a scale, divided by R; "unit" is it scaled to a
    step of length `lr sqrt(max(1, m / n))`.

    Args:
        method, steps: how orth(M) is found, and in how many iterations; see `poise.linalg.polar`. "ns5" with five, as in the
            authors' code; the paper speaks of one.
        others: as of `AuON`.
        options: see `Optimizer`.

    State: 1 value per element of the matrices, 2 of the rest. Source: "AuON: A Linear-time Alternative to Semi-Orthogonal
    Momentum Updates" (arXiv 2509.24320), as `AuON`.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 0.24,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        *,
        method: str = "ns5",
        steps: int | None = None,
        variant: Variant = "unit",
        gamma: float | None = None,
        adamw_lr: float | Tensor = 0.008,
        adamw_betas: tuple[float, float] = (0.8, 0.95),
        adamw_eps: float = 1e-10,
        adamw_weight_decay: float = 0.0,
        decay: Decay = "coupled",
        **options: Unpack[Options],
    ) -> None:
        links = orthogonalize(method, steps), cosh_rms(variant, gamma)
        rule = chain(momentum_link(momentum, nesterov=True, average=True), *links)
        rest = AdamWRest(adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay)
        super().__init__(params, rest.beside("hybrid-auon", rule, lr, weight_decay), lr, weight_decay, decay, **options)
