"""Natural GaLore: GaLore with the projected gradient divided by an empirical Fisher matrix of the last few."""

from __future__ import annotations

from typing import Literal, Unpack

import torch
from torch import Tensor

from poise.catalog import Paper, log_uniform, method
from poise.linalg.projectors import Projector, Side
from poise.linalg.woodbury import row_weights

from ..optimizer import Optimizer
from ..options import Options
from ..routing import Params
from ..skeleton import AdamWRest
from ..transform import Context, Param, Slot, State, Transform, chain
from ..transforms.adaptive import adam
from ..transforms.step import Decay
from ..transforms.subspace import OnRefresh, projected


class windowed_natural(Transform):
    r"""A rule driven on natural gradients of a window: `u <- rule( (lambda I + sum_i g_i g_i^T)^-1 u )`.

    The g_i are the last `history` of what reached this link, the present u among them, flattened; of stacked experts each by
    itself. There is no factor 1 / history. Alone in the window, u is divided by `lambda + ||u||^2`.

    Args:
        inner: the rule.
        history: s, gradients in the window.
        damping: lambda, positive.
        clear_every: the window is emptied before steps 1, clear_every + 1, ...; 0: never. Under `projected` with the same
            period, no gradient of another subspace is ever in it.

    State: `window`, s values per element, signed, so that `projected(on_refresh="rotate")` may carry it over.

    u is itself in the window, so the result is a sum of its rows whose weights come from products of rows alone
    (`poise.linalg.woodbury.row_weights`); products, weights and sum are taken in float64, for gradients that are nearly
    the same.
    """

    unit = "tensor"

    def __init__(self, inner: Transform, history: int = 20, damping: float = 1e-3, clear_every: int = 0) -> None:
        if history < 1:
            raise ValueError(f"history={history}: must be at least 1")
        if not damping > 0.0:
            raise ValueError(f"damping={damping}: must be positive")
        if clear_every < 0:
            raise ValueError(f"clear_every={clear_every}: must not be negative")
        self.inner, self.history, self.every, self.blind = (inner,), history, clear_every, inner.blind
        self.defaults = {"damping": damping}

    def slots(self, p: Param) -> dict[str, Slot]:
        # in front, where the last dimensions stay those of the matrix
        return {"window": Slot((self.history, *p.shape), dims=(None, *range(len(p.shape))))}

    def refresh(self, u: Tensor, state: State, x: Tensor, k: Context) -> None:
        state["window"] = torch.zeros_like(state["window"])

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        row = (k.step - 1) % self.history  # the oldest one; the order of rows makes no difference
        window = state["window"].clone()
        window[row] = u
        state["window"] = window
        experts = u.shape[:-2] if k.param.role == "experts" else u.shape[:0]
        G = window.double().flatten(1 + len(experts)).movedim(0, -2)  # (experts, history, elements)
        weights = row_weights(G @ G.mT, row, k.damping)
        natural = (G.mT @ weights[..., None])[..., 0].to(u.dtype).reshape(u.shape)
        return k.inner[0].apply(natural)

    def update_rms(self, p: Param) -> float | None:
        return self.inner[0].update_rms(p)

    def __repr__(self) -> str:
        return f"windowed_natural({self.inner[0]!r}, {self.history})"


@method(
    "natural-galore",
    family="optim",
    paper=Paper("Natural GaLore: Accelerating GaLore", arxiv="2410.16029", year=2024),
    tune={
        "lr": log_uniform(1e-3, 0.1),
        "weight_decay": log_uniform(1e-3, 1.0),
        "damping": log_uniform(1e-5, 1.0),
    },
    mutant=("window[row] = u", "window[row] = u / self.history**0.5"),
    exempt={
        "the_state_of_a_large_matrix_takes_the_bytes_it_should": "the suite's projections have fewer than the 4096 entries "
        "from which on state is encoded; the bytes of larger ones are shown in the rule's own tests",
    },
)
class NaturalGaLore(Optimizer):
    r"""GaLore on natural gradients: the projected gradient times the inverse Fisher matrix of the last few of them.

    For each hidden matrix, R of the size k the projected gradient as of `GaLore`, flattened:

        F   = sum of R_i R_i^T over the last s steps, the present one among them
        N   = (lambda I + F)^-1 R
        M  <- b1 M + (1 - b1) N;   V <- b2 V + (1 - b2) N^2
        W  <- W - lr * scale * sqrt(1 - b2^t) / (1 - b1^t) * back( M / (sqrt(V) + eps) )
        W  <- (1 - lr * weight_decay) W

    Only a system of s equations is solved. With s = 1, N = R / (lambda + ||R||^2). For large lambda, lambda N is R, and this is
    GaLore with eps times lambda.

    Args:
        lr: 0.01, of matrices and the rest alike.
        betas: (0.9, 0.999). eps: 1e-6, added to the root before bias correction. N is smaller than R, by ||R|| squared where
            that is large, and eps is not.
        weight_decay: 0, after the step and not scaled, as in the release (`decay="after"`).
        rank: 128; or a share of the side that is compressed.
        history: s, 20. damping: lambda, 1e-3. Well below ||R||^2 it takes out of R all that the window has seen before. On
            regression without noise, where gradients repeat themselves, GaLore then needed fewer steps than this; with lambda
            about ||R||^2 or above they were alike.
        update_proj_gap: 200. proj_scale: 0.25.
        side: "short", as GaLore and the paper; "both" is the release, whose Tucker factors of a matrix are its leading left and
            right singular vectors. Others as in `GaLore`.
        projection: "svd", "randomized" or "random".
        clear_history: with each new projection the window is emptied. The release keeps what it had in the old one.
        on_refresh: what becomes of M and V then: "keep", as in the release, "rotate" or "reset"; "rotate" carries over a window
            that is kept, too.
        inner: another rule in Adam's place.
        adamw_lr, adamw_betas, adamw_weight_decay: of the rest; None for those of the matrices.
        options: see `Optimizer`.

    State: that of GaLore and s r max(m, n) values for each matrix (`both`: s r^2).

    Source: "Natural GaLore: Accelerating GaLore" (arXiv 2410.16029), whose F has no factor 1 / s where it is computed, and its
    release. Its online variants, which train the projection, are not here.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int | float = 128,
        history: int = 20,
        damping: float = 1e-3,
        update_proj_gap: int = 200,
        proj_scale: float = 0.25,
        side: Side = "short",
        projection: Literal["svd", "randomized", "random"] = "svd",
        clear_history: bool = True,
        on_refresh: OnRefresh = "keep",
        inner: Transform | None = None,
        adamw_lr: float | Tensor | None = None,
        adamw_betas: tuple[float, float] | None = None,
        adamw_weight_decay: float | None = None,
        decay: Decay = "after",
        **options: Unpack[Options],
    ) -> None:
        if projection not in ("svd", "randomized", "random"):
            raise ValueError(f"projection={projection!r}: must be 'svd', 'randomized' or 'random'")
        inside = adam(betas, eps, eps_at="uncorrected") if inner is None else inner
        natural = windowed_natural(inside, history, damping, update_proj_gap if clear_history else 0)
        own = (adamw_lr, adamw_betas or betas, eps, adamw_weight_decay)
        rest = AdamWRest.following(lr, weight_decay, *own, "uncorrected")
        rule = chain(projected(natural, Projector(projection, rank, side), update_proj_gap, on_refresh, proj_scale))
        super().__init__(params, rest.beside("natural-galore", rule, lr, weight_decay), lr, weight_decay, decay, **options)
