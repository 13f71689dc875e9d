"""GradNormLoRP: low-rank changes of weights whose rows keep learned lengths, trained with Adam in subspaces of the factors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, Unpack, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from poise.catalog import Paper, choice, method
from poise.linalg.lengths import lengths
from poise.linalg.projectors import Projector
from poise.modules import Rows
from poise.optim import Optimizer, Route, chain, everything
from poise.optim.options import Options
from poise.optim.transforms.adaptive import adam
from poise.optim.transforms.subspace import projected

from .reparameterization import Reparameterization

Norm = Literal["row", "column"]


@method(
    "gradnormlorp",
    family="training",
    kind="parametrization",
    paper=Paper("Gradient Weight-normalized Low-rank Projection", arxiv="2412.19616", year=2025),
    tune={"rank": choice(4, 8, 16, 32), "norm": choice("row", "column")},
    mutant=("magnitude * (direction / ", "(direction / "),
)
class GradNormLoRP(Reparameterization):
    """A frozen weight plus a low-rank change, each row brought to a learned length: `W = M (W0 + s I J) / ||W0 + s I J||`.

        V = W0 + s I J,   n_i = ||V_i||                     I (outputs, rank), J (rank, rest), s = alpha / rank
        W_i  = M_i V_i / n_i                                M the lengths of the rows of W0 at first, I = 0, J random
        dM_i = <dW_i, V_i> / n_i
        dV_i = M_i / n_i (dW_i - V_i <dW_i, V_i> / n_i^2)   at right angles to V_i;   dI = s dV J^T,  dJ = s I^T dV

    W0 is frozen: M, I and J alone are trained, and `W = W0` at first. `fold` makes plain layers of it again, with W as weight.

        reparameterize(model, GradNormLoRP, "*.attn.*", rank=8, alpha=16)
        opt = projected_adamw(model, lr=3e-5, rank=4)
        ...
        fold(model)

    Any optimizer may train it; `projected_adamw` is the paper's, whose state for the factors is smaller than they are.

    Args:
        rows: how the layer stores its weight; `reparameterize` gives it.
        rank: of the change, 8; no more than the weight's smaller dimension.
        alpha: s = alpha / rank; 16 in the authors' fine-tuning. None: s = 1.
        norm: whose lengths are learned: "row", each output's, as adapters of this form are usually kept, or "column", each
            input's. The paper writes of columns, its code takes rows.
        seed: of J, which is uniform within +- 1 / sqrt(rest), as that of LoRA.

    Raises:
        ValueError: an impossible setting; (from `reparameterize`) a zero row, or column, which has no direction.

    Source: "Gradient Weight-normalized Low-rank Projection" (arXiv 2412.19616). Followed is the paper: the optimizer in its
    code keeps the whole weight as direction, leaves out that dV stands at right angles to it, and forgets M in each step.
    Dropout on the inputs of the change cannot be written as a weight, and is left out.
    """

    def __init__(self, rows: Rows, rank: int = 8, alpha: float | None = None, norm: Norm = "row", seed: int = 0) -> None:
        super().__init__(rows)
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank={rank!r}: must be a whole number from 1")
        if alpha is not None and not alpha > 0:
            raise ValueError(f"alpha={alpha}: must be positive, or None")
        if norm not in get_args(Norm):
            raise ValueError(f"norm={norm!r}: must be 'row' or 'column'")
        self.rank, self.alpha, self.norm, self.seed = rank, alpha, norm, seed
        self.scale = 1.0 if alpha is None else alpha / rank

    @property
    def dim(self) -> int:
        """The dimension along which lengths are taken."""
        return 1 if self.norm == "row" else 0

    def make(self, matrix: Tensor, *beside: Tensor) -> Tensor:
        magnitude, left, right = beside
        direction = matrix + self.scale * (left @ right)
        magnitude = magnitude.unsqueeze(self.dim)
        return magnitude * (direction / lengths(direction, self.dim))

    def split(self, matrix: Tensor) -> tuple[Tensor, ...]:
        outputs, rest = matrix.shape
        drawn = torch.rand(self.rank, rest, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)
        right = ((2 * drawn - 1) / math.sqrt(rest)).to(matrix)
        return lengths(matrix, self.dim).squeeze(self.dim), matrix.new_zeros(outputs, self.rank), right

    def attached(self, *stored: nn.Parameter) -> None:
        stored[-1].requires_grad_(False)

    def check(self, matrix: Tensor, name: str) -> None:
        self.refuse_zeros(matrix, self.dim, name)
        if self.rank > min(matrix.shape):
            raise ValueError(f"rank={self.rank}: {name!r} is {tuple(matrix.shape)}, so no more than {min(matrix.shape)}")

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, norm={self.norm!r}"


class projected_adam(projected):
    """Adam in a subspace of each matrix's gradients, as `projected` drives it, with one more subspace taken before step 2.

    At the first step one factor is zero, so the other has no gradient that a subspace could be read from.

    Args:
        projector: a `poise.linalg.projectors.Projector`. All rows: Adam as it is.
        every: steps between two subspaces; state stays over the change.
        scale: factor of the result.
        betas, eps: Adam's.
    """

    def __init__(
        self,
        projector: Projector,
        every: int = 500,
        scale: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(adam(betas, eps), projector, every, proj_scale=scale)

    def due(self, step: int) -> bool:
        return step == 2 or super().due(step)


def projected_adamw(
    model: nn.Module,
    lr: float | Tensor = 3e-5,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    rank: int = 4,
    proj_scale: float = 4.0,
    update_every: int = 500,
    **options: Unpack[Options],
) -> Optimizer:
    """GradNormLoRP's optimizer: `projected_adam` on the factors of `GradNormLoRP` layers, AdamW on everything else.

    A factor of n x r is projected along its long side only: its other side has r entries already. Adam then keeps 2 rank r
    values and a basis of n rank for it, instead of 2 n r. With state="int8" it is the paper's 8-bit variant.

    Args:
        model: with `GradNormLoRP` layers. Frozen parameters are left out.
        lr: 3e-5, of the authors' fine-tuning; 0.01 of their pre-training.
        rank: of the subspace of each factor, 4.
        proj_scale: factor of the factors' updates: 4 in fine-tuning, 0.25 in pre-training.
        update_every: steps between two bases: 500 in fine-tuning, 250 in pre-training.
        options: see `Optimizer`.

    Raises:
        ValueError: no layer of `model` is held so.
    """
    factors = {id(p) for kept in _held(model) for p in (kept.original1, kept.original2)}
    if not factors:
        raise ValueError("model: none of its weights is held by GradNormLoRP; reparameterize(model, GradNormLoRP) comes first")
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    chosen: dict[str, list[tuple[str, Tensor]]] = {"projected": [], "adam": []}
    for name, p in named:
        chosen["projected" if id(p) in factors else "adam"].append((name, p))
    low = projected_adam(Projector("svd", rank, "long"), update_every, proj_scale, betas, eps)
    routes = [Route("projected", chain(low), everything), Route("adam", chain(adam(betas, eps)), everything)]
    groups = [{"params": pairs, "rule": rule} for rule, pairs in chosen.items() if pairs]
    return Optimizer(groups, routes, lr, weight_decay, **options)


def _held(model: nn.Module) -> Iterator[Any]:
    """What is stored of each weight that is held so."""
    for module in model.modules():
        if isinstance(module, ParametrizationList) and any(isinstance(one, GradNormLoRP) for one in module):
            yield module
