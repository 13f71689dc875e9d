"""GaLore: Adam on a low-rank projection of the gradient."""

from __future__ import annotations

from typing import Literal, Unpack

from torch import Tensor

from poise.catalog import Paper, choice, log_uniform, method
from poise.linalg.projectors import Projector, Side

from ..optimizer import Optimizer
from ..options import Options
from ..routing import Params
from ..skeleton import AdamWRest
from ..transform import Transform, chain
from ..transforms.adaptive import adam
from ..transforms.step import Decay
from ..transforms.subspace import OnRefresh, projected


@method(
    "galore",
    family="optim",
    paper=Paper("Memory-Efficient LLM Training by Gradient Low-Rank Projection", arxiv="2403.03507", year=2024),
    tune={
        "lr": log_uniform(1e-3, 0.1),
        "weight_decay": log_uniform(1e-3, 1.0),
        "rank": choice(32, 64, 128),
        "on_refresh": choice("keep", "rotate", "reset"),
    },
    mutant=('eps_at="uncorrected"', 'eps_at="corrected"'),
    exempt={
        "the_state_of_a_large_matrix_takes_the_bytes_it_should": "the suite's bases, a ninth of the state, have fewer than the "
        "4096 entries from which on state is encoded; what larger ones take is shown in the rule's own tests",
    },
)
class GaLore(Optimizer):
    r"""Adam on a low-rank projection of the gradient, whose state is as small as the projection; AdamW for all but matrices.

    For each hidden matrix `W` (rows = outputs; a convolution as (out, in * kernel), each of stacked experts on its own) of
    m x n with m >= n, and the other way round for m < n:

        P   = the r leading right singular vectors of G, as rows, taken anew before steps 1, gap + 1, 2 gap + 1, ...
        R   = G P^T
        M  <- b1 M + (1 - b1) R;   V <- b2 V + (1 - b2) R^2
        W  <- W - lr * scale * sqrt(1 - b2^t) / (1 - b1^t) * ( M / (sqrt(V) + eps) ) P
        W  <- (1 - lr * weight_decay) W

    The update has rank r at most. At r = min(m, n) it is Adam in a rotated space, which is not Adam.

    Args:
        lr: 0.01, of matrices and the rest alike. Matrices move like Adam's at lr * scale.
        betas: (0.9, 0.999). eps: 1e-6, added to the root before bias correction.
        weight_decay: 0, after the step and not scaled, as in the release (`decay="after"`).
        rank: r, 128; or a share of the side that is compressed, in (0, 1].
        update_proj_gap: steps between projections, 200. The paper found 50 to 1000 to be alike.
        proj_scale: 0.25, `scale` in the release.
        side: the side that becomes shorter: "short" (the release's std), "long" (reverse_std), "left" (rows), "right" or "both"
            (full, with a state of r x r).
        projection: "svd"; "randomized" finds nearly the same subspace in far fewer operations; "random" does not look at the
            gradient.
        on_refresh: "keep" reads the old moments in the new basis, as the release does, though its vectors have other meanings
            then; "rotate" carries them over, "reset" begins anew with every projection. See `projected`.
        inner: another rule in Adam's place, such as `lion()`: betas and eps are then its own business.
        adamw_lr, adamw_betas, adamw_weight_decay: of the rest; None for those of the matrices.
        options: see `Optimizer`.

    State: 2 r max(m, n) + r min(m, n) values for each matrix (`both`: 2 r^2 + r (m + n)), 2 per element of the rest. Source:
    "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection" (arXiv 2403.03507) and its release. Unlike the
    release: singular vectors have the signs that fit the ones before them, ranks above a side's length are cut to it on every
    side, and gradients are not freed one by one during the backward pass.
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
        update_proj_gap: int = 200,
        proj_scale: float = 0.25,
        side: Side = "short",
        projection: Literal["svd", "randomized", "random"] = "svd",
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
        projector = Projector(projection, rank, side)
        inside = adam(betas, eps, eps_at="uncorrected") if inner is None else inner
        own = (adamw_lr, adamw_betas or betas, eps, adamw_weight_decay)
        rest = AdamWRest.following(lr, weight_decay, *own, "uncorrected")
        rule = chain(projected(inside, projector, update_proj_gap, on_refresh, proj_scale))
        super().__init__(params, rest.beside("galore", rule, lr, weight_decay), lr, weight_decay, decay, **options)
