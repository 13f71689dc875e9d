"""GOAT: a mixture of low-rank experts, each begun at its own part of the weight's singular values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from poise.catalog import Paper, log_uniform, method
from poise.linalg.lengths import wide

from ..adaptation import Adaptation, Draw
from ..adapter import Adapter, Base, added
from ..layout import Layout
from ..routing import Route, beside, imbalance, route
from ..targets import Place
from .lora import check


class Experts(Adapter):
    """Low-rank products of which each token chooses some, less their mean as it was at first.

        y = W x - s/E sum_i B0_i A0_i x + s sum_{i chosen} p_i B_i A_i dropout(x)

    Args:
        layout: of the layer.
        down, up: (E r, inputs) and (outputs, E r), of all experts one after another; parameters, and kept as they are besides.
        gate: (E, inputs), whose products with the input are the logits.
        scale, top_k, balance, dropout: as of GOAT.

    Attributes:
        imbalance: the balance loss of the last forward pass, k at best; None before the first.
    """

    first_A: Tensor
    first_B: Tensor

    def __init__(
        self,
        layout: Layout,
        down: Tensor,
        up: Tensor,
        gate: Tensor,
        scale: float,
        top_k: int,
        balance: float,
        dropout: float,
    ) -> None:
        super().__init__(layout)
        self.lora_A, self.lora_B, self.gate = nn.Parameter(down), nn.Parameter(up), nn.Parameter(gate)
        self.register_buffer("first_A", down.clone())
        self.register_buffer("first_B", up.clone())
        self.scale, self.top_k, self.balance = scale, top_k, balance
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.imbalance: Tensor | None = None
        self.foldable = self.experts == 1  # which every input chooses, wholly

    @property
    def experts(self) -> int:
        return len(self.gate)

    def forward(self, x: Tensor, layer: Any, base: Base) -> Tensor:
        y, dropped = base(x), x
        if x.is_floating_point():  # words of an embedding are not
            x = x.to(self.lora_A.dtype)
            dropped = self.dropout(x)
        found = self.routed(x, layer)
        loss = imbalance(found)
        self.imbalance = loss.detach()
        h = self.layout.down(layer, dropped, self.lora_A)
        mixed = self.layout.up(h * self._over(found.weights), self.lora_B)
        first = self.layout.up(self.layout.down(layer, x, self.first_A), self.first_B)
        return added(y, beside(self.scale * (mixed - first / self.experts), loss, self.balance))

    def routed(self, x: Tensor, layer: Any) -> Route:
        """The experts that each position of the input chooses."""
        logits = self.layout.down(layer, x, self.gate)
        return route(logits.movedim(self.layout.axis, -1) if self.layout.kind == "conv" else logits, self.top_k)

    def _over(self, weights: Tensor) -> Tensor:
        """Each expert's weight at each of its rows of A x."""
        rows = weights.repeat_interleave(len(self.lora_A) // self.experts, dim=-1)
        return rows.movedim(-1, self.layout.axis) if self.layout.kind == "conv" else rows

    def folded(self, matrix: Tensor) -> Tensor:
        """Of a single expert."""
        down, up, first_down, first_up = (t.to(matrix.dtype) for t in (self.lora_A, self.lora_B, self.first_A, self.first_B))
        return matrix + self.scale * (up @ down - first_up @ first_down)

    def extra_repr(self) -> str:
        return f"experts={self.experts}, top_k={self.top_k}, rank={len(self.lora_A)}, scale={self.scale:.4g}"


@method(
    "goat",
    family="adapt",
    kind="adapter",
    paper=Paper(
        "Make LoRA Great Again: Boosting LoRA with Adaptive Singular Values and Mixture-of-Experts Optimization Alignment",
        arxiv="2502.16894",
        year=2025,
    ),
    tune={"balance": log_uniform(1e-4, 1e-2)},
    mutant=("mixed - first / self.experts", "mixed - first"),
    exempt={
        "starts as the base": "Its output is the base's on the mean over all choices of experts; each single choice is off "
        "by a part of the weight that is rho times smaller than its singular values.",
        "folds": "Which experts act depends on the input, so no single weight does the same, unless there is one expert.",
        "ddp": "Each process balances the experts over its own part of the batch, as is done where mixtures are trained.",
    },
)
@dataclass(frozen=True)
class GOAT(Adaptation):
    """A mixture of low-rank experts, begun at parts of the weight from its largest singular values to its small ones.

        W = U diag(sigma) V^T,   expert i begins at the r_e = rank / E singular values from i floor(min(out, in) / E) on:
        B_i = U_i diag(sigma_i / (s rho))^(1/2),    A_i = diag(sigma_i / (s rho))^(1/2) V_i^T
        p = softmax(gate x) over all E experts; the top k of it, divided by their sum
        y = W x - s/E sum_i B_i A_i x |_at first + s sum_{i of the top k} p_i B_i A_i dropout(x)
        loss + balance * sum over layers of E sum_i f_i P_i       (poise.adapt.routing.imbalance)

    The term with 1/E takes away what the experts add on the mean over all choices, so that training begins at the base. The
    paper writes it into the frozen weight; here the weight stays as it is, and the first factors are kept beside it, in the
    adapter's own dtype: as much memory again as the experts take, and a few products more in each pass. With one expert, k = 1
    and rho = 1 this is PiSSA. A layer with min(out, in) below `rank` is left alone.

    Args:
        rank: 32, of all experts together; a multiple of `experts`.
        experts, top_k: E = 8 and k = 2.
        scale: "theory": s = sqrt(3 eta in / r_e), for which the expected step of the product is that of full fine-tuning.
            "alpha": s = alpha / r_e, as the authors' scripts run it.
        eta: 1, the ratio of the learning rates of full fine-tuning and of this.
        alpha: with scale="alpha"; None: 2 rank.
        rho: 10; how much smaller the experts begin than the singular values they are made of.
        dropout: of the experts' input, 0.05. One mask for all experts of a layer.
        balance: 1e-3; the weight of the balance loss, whose gradient is added in the backward pass, and so not scaled where
            the model's loss is.

    Raises:
        ValueError: settings out of range; no layer is wide enough for the rank.

    Learning rates of the paper: 2e-5 for generation, 1e-4 for GLUE. Each adapter's `imbalance` is its balance loss in the last
    pass. Source: "Make LoRA Great Again: Boosting LoRA with Adaptive Singular Values and Mixture-of-Experts Optimization
    Alignment" (arXiv 2502.16894). The paper leaves open whether r in its scale is an expert's rank or that of all together; it
    is an expert's here, as in the authors' code, where the scale of the theory cannot be had together with these beginnings.
    """

    rank: int = 32
    experts: int = 8
    top_k: int = 2
    scale: Literal["theory", "alpha"] = "theory"
    eta: float = 1.0
    alpha: float | None = None
    rho: float = 10.0
    dropout: float = 0.05
    balance: float = 1e-3

    def __post_init__(self) -> None:
        check(self.rank, self.alpha, self.dropout)
        if not isinstance(self.experts, int) or self.experts < 1:
            raise ValueError(f"experts={self.experts}: must be a whole number of at least 1")
        if self.rank % self.experts:
            raise ValueError(f"rank={self.rank}: must be a multiple of experts={self.experts}")
        if not isinstance(self.top_k, int) or not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k={self.top_k}: must be a whole number from 1 to experts={self.experts}")
        if self.scale not in ("theory", "alpha"):
            raise ValueError(f"scale={self.scale!r}: must be 'theory' or 'alpha'")
        for name in ("eta", "rho"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name}={value}: must be above 0 and finite")
        if not 0 <= self.balance < math.inf:
            raise ValueError(f"balance={self.balance}: must be at least 0 and finite")

    def choose(self, model: nn.Module, places: Sequence[Place]) -> Sequence[Place]:
        return [place for place in places if min(place.layout.outputs, place.layout.inputs) >= self.rank]

    def strength(self, layout: Layout) -> float:
        """s of a layer."""
        own = self.rank // self.experts
        if self.scale == "alpha":
            return (2 * self.rank if self.alpha is None else self.alpha) / own
        return math.sqrt(3 * self.eta * layout.inputs / own)

    def adapter(self, place: Place, draw: Draw, shared: Any) -> Experts:
        layout, scale = place.layout, self.strength(place.layout)
        gate = draw.uniform(self.experts, layout.inputs, bound=layout.inputs**-0.5)
        U, sigma, Vh = torch.linalg.svd(layout.rows.view(wide(place.layer.weight.detach())), full_matrices=False)
        parts = segments(len(sigma), self.experts, self.rank // self.experts).to(sigma.device)
        root = (sigma[parts] / (scale * self.rho)).sqrt()
        down, up = (root[:, None] * Vh[parts]).to(draw.dtype), (U[:, parts] * root).to(draw.dtype)
        return Experts(layout, down.contiguous(), up.contiguous(), gate, scale, self.top_k, self.balance, self.dropout)


def segments(count: int, experts: int, each: int) -> Tensor:
    """The indices of each expert's singular values, of `count` in descending order, one expert after another."""
    starts = torch.arange(experts) * (count // experts)
    return (starts[:, None] + torch.arange(each)).flatten()
