"""NAMO and NAMO-D: Muon with Adam's step size, one for each matrix or one for each of its columns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor

from poise.catalog import Paper, choice, log_uniform, method
from poise.linalg.norms import inner

from ..optimizer import Optimizer
from ..options import Options
from ..routing import Params
from ..skeleton import AdamWRest
from ..transform import Context, Param, Slot, State, Transform, chain
from ..transforms.adaptive import check_eps
from ..transforms.momentum import momentum as momentum_link
from ..transforms.spectral import ScaleRule, check_scale_rule, matrices, orthogonalize, shape_factors
from ..transforms.step import displacement

PAPER = Paper("Adam Improves Muon: Adaptive Moment Estimation with Orthogonalized Momentum", arxiv="2602.17080", year=2026)


class norm_adapted(Transform):
    r"""The displacement of a momentum that is orthogonalized and then scaled by how much of its gradients' length it keeps.

    With M the momentum that comes in, G the raw gradient, `O = orth(M)` by the inner rule and s the shape's factor:

        v     <- mu2 v + (1 - mu2) ||G||^2
        d      = ||M|| / (sqrt(v) + eps)
        alpha  = lr sqrt(1 - mu2^t) / (1 - mu^t) d
        u     <- -( min(s alpha, 1) O + min(weight_decay min(alpha, 1), 1) W )

    The norms are those of the whole matrix, or with `columns` of each column j, whose v_j, d_j and alpha_j are its own. The
    columns' d_j are first clamped to `[c dbar, dbar / c]`, dbar their mean. Each part of a fused projection is a matrix.

    Args:
        inner: the rule that orthogonalizes.
        momentum: mu, of the momentum that comes in, for its bias correction.
        mu2: in [0, 1). eps: added to the root before bias correction.
        clamp: c, in [0, 1]; 0: d_j is not clamped.
        scale_rule: s, as in `shape_scale`.
        cap: without it no minimum is taken.

    State: one number for each matrix, or each column, never encoded. It reads lr and weight_decay, so `displacement` follows.
    """

    unit = "matrix"

    def __init__(
        self,
        inner: Transform,
        momentum: float = 0.95,
        mu2: float = 0.99,
        eps: float = 1e-8,
        columns: bool = False,
        clamp: float = 0.0,
        scale_rule: ScaleRule = "match_rms",
        cap: bool = True,
    ) -> None:
        if not 0.0 <= mu2 < 1.0:
            raise ValueError(f"mu2={mu2}: must be in [0, 1)")
        if not 0.0 <= clamp <= 1.0:
            raise ValueError(f"clamp={clamp}: must be in [0, 1]")
        check_eps(eps)
        check_scale_rule(scale_rule)
        self.inner = (inner,)
        self.columns, self.cap = columns, cap
        self.scale_rule: ScaleRule = scale_rule
        self.defaults = {"momentum": momentum, "mu2": mu2, "eps": eps} | ({"clamp": clamp} if columns else {})

    def slots(self, p: Param) -> dict[str, Slot]:
        experts = tuple(p.shape[:-2]) if p.role == "experts" else ()
        shape = (*experts, len(matrices(p)), p.matrix[1] if self.columns else 1)
        return {"norm_sq": Slot(shape, kind="exact", dims=(None,) * len(shape))}

    def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float]:
        mu, mu2 = float(hyper["momentum"]), float(hyper["mu2"])
        return {
            "rate": float(hyper["lr"]) * math.sqrt(1 - mu2**step) / (1 - mu**step),
            "mu2": mu2,
            "rest": 1 - mu2,
            "eps": float(hyper["eps"]),
            "clamp": float(hyper.get("clamp", 0.0)),
            "weight_decay": float(hyper["weight_decay"]),
        }

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        v = state["norm_sq"] = k.mu2 * state["norm_sq"] + k.rest * self._squares(k.grad, k.param)
        d = self._squares(u, k.param).sqrt() / (v.sqrt() + k.eps)
        if k.clamp > 0:
            mean = d.mean(-1, keepdim=True)
            d = torch.minimum(torch.maximum(d, k.clamp * mean), mean / k.clamp)
        alpha = k.rate * d
        step = alpha * u.new_tensor(shape_factors(k.param, self.scale_rule))[:, None]
        if self.cap:
            alpha, step = alpha.clamp(max=1), step.clamp(max=1)
        shrink = k.weight_decay * alpha
        if self.cap:
            shrink = shrink.clamp(max=1)
        moved = self._spread(-shrink, k.param) * x
        return moved.addcmul_(self._spread(-step, k.param), k.inner[0].apply(u))

    def _squares(self, u: Tensor, p: Param) -> Tensor:
        """Squared norms of each part: (..., parts, 1), or (..., parts, columns)."""
        parts = u.split([m for m, _ in matrices(p)], dim=-2)
        if self.columns:
            return torch.stack([torch.linalg.vecdot(part, part, dim=-2) for part in parts], dim=-2)
        return torch.stack([inner(part, part) for part in parts], dim=-1)[..., None]

    def _spread(self, values: Tensor, p: Param) -> Tensor:
        """A part's numbers on each of its rows."""
        rows = [m for m, _ in matrices(p)]
        if len(rows) == 1:
            return values
        return torch.cat([one.expand(*one.shape[:-2], m, -1) for one, m in zip(values.split(1, -2), rows, strict=True)], dim=-2)

    def __repr__(self) -> str:
        kind = "columns" if self.columns else "matrix"
        return f"norm_adapted({self.inner[0]!r}, {kind}, scale_rule={self.scale_rule!r}, cap={self.cap})"


@method(
    "namo",
    family="optim",
    paper=PAPER,
    tune={"lr": log_uniform(3e-4, 0.1), "weight_decay": log_uniform(1e-3, 1.0)},
    mutant=("math.sqrt(1 - mu2**step) / (1 - mu**step)", "(1 - mu**step) / math.sqrt(1 - mu2**step)"),
)
class NAMO(Optimizer):
    """Muon whose step shrinks with the noise of a matrix's gradients; AdamW for everything but hidden matrices.

    For each hidden matrix `W` (rows = outputs; a convolution as (out, in * kernel), each of stacked experts and each part of a
    fused q, k, v on its own):

        buf   <- mu buf + (1 - mu) G
        M      = (1 - mu) G + mu buf  with nesterov, else buf
        v     <- mu2 v + (1 - mu2) ||G||_F^2
        alpha  = lr sqrt(1 - mu2^t) / (1 - mu^t) ||M||_F / (sqrt(v) + eps)
        W     <- (1 - weight_decay min(alpha, 1)) W - min(s alpha, 1) orth(M)

    alpha is lr where gradients repeat themselves (nesterov begins at 1 + mu times that), and 0.16 lr where they are nothing but
    noise, at mu = 0.95: `sqrt((1 - mu) / (1 + mu))`.

    Args:
        lr: 0.01, of matrices and AdamW alike.
        weight_decay: 0.1. It follows alpha, not lr.
        momentum, nesterov: mu, 0.95, with look-ahead. mu2: 0.99. eps: 1e-8.
        method, steps: how orth(M) is found, and in how many iterations; see `poise.linalg.polar`. The release's is "ns5".
        scale_rule: `s`: "match_rms" is 0.2 sqrt(max(rows, columns)); see `shape_scale` for the others.
        cap: the two minima, which stand in the release. The paper's form has neither them nor s: `cap=False,
            scale_rule="none"`.
        adamw_lr, adamw_weight_decay: None: those of the matrices, as in the release. adamw_betas, adamw_eps: (0.9, 0.95), 1e-8,
            which is added to the root after bias correction as PyTorch does; the release adds it before.
        options: see `Optimizer`.

    State: 1 value per element of the matrices and 1 for each matrix, 2 per element of the rest. Source: "Adam Improves Muon:
    Adaptive Moment Estimation with Orthogonalized Momentum" (arXiv 2602.17080) and its release. Unlike the release: s of a
    convolution comes from its 2-D view.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 0.01,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        mu2: float = 0.99,
        eps: float = 1e-8,
        nesterov: bool = True,
        *,
        method: str = "polar_express",
        steps: int | None = None,
        scale_rule: ScaleRule = "match_rms",
        cap: bool = True,
        adamw_lr: float | Tensor | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        adapted = norm_adapted(orthogonalize(method, steps), momentum, mu2, eps, scale_rule=scale_rule, cap=cap)
        rule = chain(momentum_link(momentum, nesterov, average=True), adapted, displacement())
        rest = AdamWRest.following(lr, weight_decay, adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay)
        super().__init__(params, rest.beside("namo", rule, lr, weight_decay), lr, weight_decay, **options)


@method(
    "namo-d",
    family="optim",
    paper=PAPER,
    tune={
        "lr": log_uniform(3e-4, 0.1),
        "weight_decay": log_uniform(1e-3, 1.0),
        "clamp": choice(0.12, 0.4, 0.75, 0.9),
    },
    mutant=("mean / k.clamp", "mean * k.clamp"),
)
class NAMOD(Optimizer):
    """NAMO with a step size for each column of a matrix: for each input of its neurons.

    As `NAMO`, but with `||.||` the norms of column j, whose v_j, d_j and alpha_j are its own:

        v_j     <- mu2 v_j + (1 - mu2) ||G_:j||^2
        d_j      = ||M_:j|| / (sqrt(v_j) + eps),  clamped to [c dbar, dbar / c] with dbar their mean
        alpha_j  = lr sqrt(1 - mu2^t) / (1 - mu^t) d_j
        W_:j    <- max(1 - weight_decay min(alpha_j, 1), 0) W_:j - min(s alpha_j, 1) orth(M)_:j

    Args:
        clamp: c in (0, 1], 0.75; the authors tried 0.12, 0.4, 0.75 and 0.9. 1 gives all columns the mean, 0 clamps nothing.
        others: as of `NAMO`.
        options: see `Optimizer`.

    State: 1 value per element of the matrices and 1 for each column, 2 per element of the rest. Source: "Adam Improves Muon:
    Adaptive Moment Estimation with Orthogonalized Momentum" (arXiv 2602.17080) and its release, as `NAMO`.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 0.01,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        mu2: float = 0.99,
        eps: float = 1e-8,
        clamp: float = 0.75,
        nesterov: bool = True,
        *,
        method: str = "polar_express",
        steps: int | None = None,
        scale_rule: ScaleRule = "match_rms",
        cap: bool = True,
        adamw_lr: float | Tensor | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        adapted = norm_adapted(orthogonalize(method, steps), momentum, mu2, eps, True, clamp, scale_rule, cap)
        rule = chain(momentum_link(momentum, nesterov, average=True), adapted, displacement())
        rest = AdamWRest.following(lr, weight_decay, adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay)
        super().__init__(params, rest.beside("namo-d", rule, lr, weight_decay), lr, weight_decay, **options)
