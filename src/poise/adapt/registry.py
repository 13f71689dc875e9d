"""The low-rank pairs of an adapted model, through which an optimizer may treat A and B together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .adapter import LowRank


@dataclass(frozen=True)
class Pair:
    """The product s B A beside one weight, or s B R A with a core R.

    Attributes:
        name: of the layer.
        layer: whose `weight` it stands beside.
        A: (rank, inputs).
        B: (outputs, rank).
        scale: s.
        core: R, (rank, rank), if there is one.
    """

    name: str
    layer: Any
    A: nn.Parameter
    B: nn.Parameter
    scale: float
    core: nn.Parameter | None = None

    @property
    def starts_at_B(self) -> bool:
        """Whether B is what is not zero at first, as beside an embedding."""
        return self.layer.adapter.layout.kind == "embedding"


def pairs(model: nn.Module) -> list[Pair]:
    """Every pair of the model, each once, in its order. Pairs of which one factor is frozen are among them.

    Raises:
        ValueError: there is none.
    """
    found = list(_pairs(model))
    if not found:
        raise ValueError("model has no low-rank pairs; attach(model, 'lora') or a method of its kind first")
    return found


def _pairs(model: nn.Module) -> Iterator[Pair]:
    done: set[int] = set()
    for path, layer in model.named_modules():
        adapter = getattr(layer, "adapter", None)
        for part in adapter.modules() if isinstance(adapter, nn.Module) else ():
            if isinstance(part, LowRank) and id(part) not in done:
                done.add(id(part))
                yield Pair(path, layer, part.lora_A, part.lora_B, part.scale, part.core)
