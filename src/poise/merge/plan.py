"""What comes of planning: one line for each tensor of the result, or everything that is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .embeddings import RowMap


@dataclass(frozen=True)
class Part:
    """Rows of one model that go into a tensor: of which, under which name, in which order."""

    parent: int
    name: str
    rows: RowMap | None = None


@dataclass(frozen=True)
class Line:
    """One tensor of the result.

    Attributes:
        parts: in the order of the recipe's models; one alone for what is copied.
        settings: the method's, for this tensor.
        copied: not merged: numbers that are not floating.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    parts: tuple[Part, ...]
    base: Part | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    layer: int | None = None
    copied: bool = False

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    @property
    def inputs(self) -> tuple[Part, ...]:
        """All that is read for it."""
        return self.parts if self.base is None else (*self.parts, self.base)


@dataclass
class Plan:
    """All lines, in the order in which they are stored.

    Attributes:
        config: of the result; None where the models have none.
        errors: all that was found; with any, `lines` are not complete.
        notes: what the recipe says and is understood differently, or has no effect.
    """

    lines: list[Line] = field(default_factory=list)
    config: dict[str, Any] | None = None
    errors: list[ValueError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raise the first error, and say how many more there are."""
        if self.errors:
            first = self.errors[0]
            more = f" ({len(self.errors) - 1} more errors; `poise plan merge` lists them)" if len(self.errors) > 1 else ""
            first.args = (f"{first.args[0]}{more}",)
            raise first
