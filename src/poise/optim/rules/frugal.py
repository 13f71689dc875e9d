"""FRUGAL: a rule with state in a changing subspace, a rule without state on what is left."""

from __future__ import annotations

from typing import Literal, Unpack, get_args

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
from ..transforms.subspace import OnRefresh, Residual, projected, residual_only
from ..transforms.turns import Order, in_turn

Projection = Literal["tensors", "columns", "rows", "entries", "svd", "randomized", "random", "permuted"]


@method(
    "frugal",
    family="optim",
    paper=Paper("FRUGAL: Memory-Efficient Optimization by Reducing State Overhead", arxiv="2411.07837", year=2024),
    tune={
        "lr": log_uniform(1e-4, 3e-2),
        "weight_decay": log_uniform(1e-3, 1.0),
        "inactive_scale": log_uniform(0.03, 1.0),
        "projection": choice("tensors", "columns", "svd"),
    },
    mutant=("residual, proj_scale, inactive_scale, seed", "residual, proj_scale, 0.5 * inactive_scale, seed"),
    exempt={
        "a_group_added_later_trains_as_if_its_gradients_had_been_missing": "which tensors have state depends on how many there "
        "are, from the first step on: a group that is there without gradients has turns too",
    },
)
class FRUGAL(Optimizer):
    r"""Adam on a changing part of the matrices, signs of gradients on the rest of them: full updates with little state.

    For each hidden matrix `W`, with `project` and `back` of a subspace that is chosen anew before steps 1, gap + 1, 2 gap + 1,
    ... with a share `density` of the dimensions:

        R   = project(G)
        W  <- (1 - lr * weight_decay) W - lr * scale * ( back(Adam(R)) + inactive_scale * sign(G - back(R)) )

    With every new subspace Adam begins anew, its count of steps included. Embeddings, output heads, norms and vectors go to
    AdamW.

    Args:
        lr: 1e-3. betas: (0.9, 0.999). eps: 1e-8, added to the root after bias correction.
        weight_decay: 0.01, as in the release; it follows lr and is not scaled.
        density: 0.25. 0 leaves no state at all for matrices.
        update_gap: steps between choices, 200.
        projection: the subspaces. "tensors": whole tensors in turn, as in the paper's experiments; a share `density` of their
            number, at least one (`in_turn`). Random "columns", "rows" or "entries" of each matrix (a convolution as (out,
            in * kernel)), the last called randk in the release. Or along one side of each: leading singular vectors ("svd",
            "randomized"), "random" orthonormal ones, or random places ("permuted", its randperm); see
            `poise.linalg.projectors`. The release's README says that coordinates are entries by default, its code columns.
        order: of "tensors": "random", "ascending", "descending" or "mirror" (from both ends inwards).
        side: of projections along one: "short", "long", "left", "right" or "both" (not "permuted"), as in `GaLore`.
        on_refresh: what becomes of Adam's state: "reset", "keep" or "rotate"; of "tensors" it is always begun anew.
        residual: the rule for what is left: "sign", "sgd", or "none", which makes it GaLore, or BAdam with "tensors".
        proj_scale: 1, proj_params_lr_scale in the release. inactive_scale: 1, its inactive_lr_scale, of which the authors take
            0.1 to fine-tune.
        inner: another rule in Adam's place, such as `lion()`: betas and eps are then its own business.
        adamw_lr, adamw_betas, adamw_weight_decay: of the rest; None for those of the matrices.
        options: see `Optimizer`.

    State: 2 values for a share `density` of the elements of the matrices, 2 per element of the rest. With "tensors" none for
    those whose turn it is not: their state rests, and `opt.state_bytes()` says what is held. `state_dict()` writes it out as
    the zeros it stands for. Vectors keep their basis beside it, places one int64 each.

    The residual of "svd" is not orthogonal to the subspace any more once its signs are taken, as published. Source: "FRUGAL:
    Memory-Efficient Optimization by Reducing State Overhead" (arXiv 2411.07837) and its release, which is followed where they
    differ. Unlike the release: turns go round over all groups of matrices, "mirror" takes the nearest even number instead of
    refusing an odd one, and one tensor, column, row or entry is the least.

    Raises:
        ValueError: also for `density=0` with `residual="none"`, which would train no matrix.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        density: float = 0.25,
        update_gap: int = 200,
        projection: Projection = "tensors",
        order: Order = "random",
        side: Side = "short",
        on_refresh: OnRefresh = "reset",
        residual: Residual = "sign",
        proj_scale: float = 1.0,
        inactive_scale: float = 1.0,
        inner: Transform | None = None,
        adamw_lr: float | Tensor | None = None,
        adamw_betas: tuple[float, float] | None = None,
        adamw_weight_decay: float | None = None,
        decay: Decay = "coupled",
        **options: Unpack[Options],
    ) -> None:
        if not 0.0 <= density <= 1.0:
            raise ValueError(f"density={density}: must be in [0, 1]")
        if projection not in get_args(Projection):
            raise ValueError(f"projection={projection!r}: must be one of {', '.join(map(repr, get_args(Projection)))}")
        if density == 0 and residual == "none":
            raise ValueError("density=0 with residual='none' would train no matrix; give one of them another value")
        inside = adam(betas, eps) if inner is None else inner
        if density == 0:
            rule: Transform = residual_only(residual, proj_scale, inactive_scale)
        elif projection == "tensors":
            seed = options.get("seed", 0)
            rule = in_turn(inside, density, update_gap, order, residual, proj_scale, inactive_scale, seed)
        else:
            projector = Projector(projection, float(density), side)
            rule = projected(inside, projector, update_gap, on_refresh, proj_scale, residual, inactive_scale)
        rest = AdamWRest.following(lr, weight_decay, adamw_lr, adamw_betas or betas, eps, adamw_weight_decay)
        super().__init__(params, rest.beside("frugal", chain(rule), lr, weight_decay), lr, weight_decay, decay, **options)
