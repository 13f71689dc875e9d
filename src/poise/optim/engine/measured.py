"""What a link measures of one parameter, numbers and small vectors, as one row of a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Columns:
    """Names of the measured values and, for vectors, their length; None for a number. Iterated, it gives the names."""

    lengths: tuple[tuple[str, int | None], ...] = ()

    @classmethod
    def numbers(cls, names: Iterable[str]) -> Columns:
        """Numbers alone."""
        return cls(tuple((name, None) for name in names))

    @classmethod
    def of(cls, values: Mapping[str, Tensor]) -> Columns:
        """The columns that `values` fill."""
        return cls(tuple((name, value.numel() if value.ndim else None) for name, value in values.items()))

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.lengths)

    def row(self, values: Mapping[str, Tensor], device: torch.device) -> Tensor:
        """`values` one after another, zeros for what was not measured."""
        pieces = [
            values[name].reshape(-1) if name in values else torch.zeros(length or 1, device=device)
            for name, length in self.lengths
        ]
        return torch.cat(pieces) if pieces else torch.zeros(0, device=device)

    def apart(self, table: Tensor) -> dict[str, Tensor]:
        """The inverse, of a table (..., columns): each number (...) and vector (..., length)."""
        pieces = table.split([length or 1 for _, length in self.lengths], dim=-1) if self.lengths else ()
        named = zip(self.lengths, pieces, strict=True)
        return {name: piece[..., 0] if length is None else piece for (name, length), piece in named}


__all__ = ["Columns"]
