"""LoRA: a product of two small matrices beside each weight, of which alone trains."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from poise.catalog import Paper, choice, method

from ..adaptation import Adaptation, Draw
from ..adapter import LowRank
from ..targets import Place


@method(
    "lora",
    family="adapt",
    kind="adapter",
    paper=Paper("LoRA: Low-Rank Adaptation of Large Language Models", arxiv="2106.09685", year=2021),
    tune={"alpha": choice(8.0, 16.0, 32.0)},
    mutant=("(math.sqrt(self.rank) if self.rank_stabilized else self.rank)", "self.rank"),
)
@dataclass(frozen=True)
class LoRA(Adaptation):
    """A trained product of two small matrices beside each weight, which stays as it is.

        y = W x + b + s B A dropout(x),    s = alpha / rank,    A ~ U(-1/sqrt(in), 1/sqrt(in)),    B = 0

    Embeddings begin the other way round: A = 0, B ~ N(0, 1). A convolution's A is a convolution with its kernel and stride, and
    B one of kernel 1. A and B are float32 (float64 beside float64 weights) whatever the weight is.

        attach(model, LoRA(rank=16, alpha=32), targets=("q_proj", "v_proj"))

    Args:
        rank: rows of A, 8.
        alpha: 8; None: as the rank, so that s = 1.
        dropout: of the adapter's input, in training, 0.
        rank_stabilized: s = alpha / sqrt(rank), with which the size of what a step does hardly depends on the rank. Off.

    Raises:
        ValueError: settings out of range.

    A rank above a layer's width is kept: it costs more than it can do. Source: "LoRA: Low-Rank Adaptation of Large Language
    Models" (arXiv 2106.09685), whose A is Gaussian; the uniform one is that of the authors' code and of peft. Rank-stabilized:
    "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA" (arXiv 2312.03732).
    """

    peft: ClassVar[bool | Literal["as LoRA"]] = True

    rank: int = 8
    alpha: float | None = 8.0
    dropout: float = 0.0
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        check(self.rank, self.alpha, self.dropout)

    @property
    def strength(self) -> float:
        return float(self.rank) if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        """s."""
        return self.strength / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def adapter(self, place: Place, draw: Draw, shared: Any) -> LowRank:
        return LowRank(place.layout, *start(place, draw, self.rank), self.scale, self.dropout)


def start(place: Place, draw: Draw, rank: int) -> tuple[Tensor, Tensor]:
    """A and B at first: their product is zero, and one of them is not."""
    if place.layout.kind == "embedding":
        return draw.zeros(rank, place.layout.inputs), draw.normal(place.layout.outputs, rank)
    return draw.uniform(rank, place.layout.inputs, bound=place.layout.inputs**-0.5), draw.zeros(place.layout.outputs, rank)


def check(rank: int, alpha: float | None, dropout: float) -> None:
    """Raise ValueError for settings that no adapter has."""
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank={rank}: must be a whole number of at least 1")
    if alpha is not None and not alpha > 0:
        raise ValueError(f"alpha={alpha}: must be above 0")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: must be at least 0 and below 1")
