"""DoRA: direction and length of each output's weights apart, the direction changed by a low-rank product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from poise.catalog import Paper, choice, method
from poise.linalg.lengths import wide

from ..adaptation import Draw
from ..adapter import Base, LowRank
from ..layout import Layout
from ..targets import Place
from .lora import LoRA, start


class WeightDecomposed(LowRank):
    """A low-rank change of a weight's directions, and its rows' lengths as a parameter."""

    def __init__(self, layout: Layout, down: Tensor, up: Tensor, scale: float, dropout: float, magnitude: Tensor) -> None:
        super().__init__(layout, down, up, scale, dropout)
        self.magnitude = nn.Parameter(magnitude)

    def forward(self, x: Tensor, layer: Any, base: Base) -> Tensor:
        y, beside = base(x), self.beside(x, layer)
        with torch.no_grad():
            lengths = torch.linalg.vector_norm(super().folded(self.layout.rows.view(wide(layer.weight))), dim=1)
        ratio = self.layout.across(self.magnitude / lengths.to(self.magnitude.dtype))
        plain = y if getattr(layer, "bias", None) is None else y - self.layout.across(layer.bias)
        # As much as the base's output lacks, so that nothing is added, not even a rounding error, where there is no change.
        return (y + ((ratio - 1) * plain + ratio * beside)).to(y.dtype)

    def folded(self, matrix: Tensor) -> Tensor:
        moved = super().folded(matrix)
        return moved * (self.magnitude.to(moved.dtype) / torch.linalg.vector_norm(moved, dim=1)).unsqueeze(1)


@method(
    "dora",
    family="adapt",
    kind="adapter",
    paper=Paper("DoRA: Weight-Decomposed Low-Rank Adaptation", arxiv="2402.09353", year=2024),
    tune={"alpha": choice(8.0, 16.0, 32.0)},
    mutant=("ratio * beside", "beside"),
)
@dataclass(frozen=True)
class DoRA(LoRA):
    """Each output's weights as a length that trains and a direction that a low-rank product changes.

        V = W + s B A,    y = m / |V| (W x + s B A x) + b,    |V| the length of each row, m at first that of W's

    The lengths |V| are taken for constants in the backward pass, which costs little accuracy and saves much memory. They are
    computed anew in every forward pass, from the whole weight.

    Args:
        rank, alpha, dropout: as of LoRA. Dropout acts on the input of A alone.
        rank_stabilized: as of LoRA; the two go together.

    Raises:
        ValueError: settings out of range; a row of a weight that is zero, which has no direction.

    Source: "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv 2402.09353). An embedding's m has one value for each feature,
    over all words, as in peft.
    """

    def adapter(self, place: Place, draw: Draw, shared: Any) -> LowRank:
        magnitude = torch.linalg.vector_norm(place.layout.rows.view(wide(place.layer.weight.detach())), dim=1)
        if bool((magnitude == 0).any()):
            row = int((magnitude == 0).nonzero()[0])
            raise ValueError(f"targets: row {row} of '{place.path}.weight' is zero and has no direction; leave the layer out")
        down, up = start(place, draw, self.rank)
        return WeightDecomposed(place.layout, down, up, self.scale, self.dropout, magnitude.to(draw.dtype))
