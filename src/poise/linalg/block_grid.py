"""A matrix cut into a grid of blocks, and square matrices, one for each block's rows or columns, stored beside it.

A matrix of m rows and n columns falls into blocks of at most `height` rows and `width` columns; the last of a side are what is
left. Equal blocks are worked on at once: `cut` gives up to four tensors (..., I, J, h, w), I of them one below another and J
side by side.

What each block keeps for its rows, c numbers a row, is stored as (..., J, m, c): for every column of blocks one number per row
of the matrix, so that a shard by rows stays one. What it keeps for its columns is stored as (..., I, n, c).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import block_diagonal as bd


@dataclass(frozen=True)
class BlockGrid:
    """The grid over matrices of one shape.

    Args:
        rows, columns: of the matrix, each at least 1.
        longest: of a block's side.
    """

    rows: int
    columns: int
    longest: int

    @property
    def height(self) -> int:
        """Rows of a block."""
        return min(self.rows, self.longest)

    @property
    def width(self) -> int:
        """Columns of a block."""
        return min(self.columns, self.longest)

    def row_shape(self, c: int) -> tuple[int, int, int]:
        """Of what is stored for rows, c numbers each."""
        return math.ceil(self.columns / self.width), self.rows, c

    def column_shape(self, c: int) -> tuple[int, int, int]:
        """Of what is stored for columns."""
        return math.ceil(self.rows / self.height), self.columns, c

    def cut(self, G: Tensor) -> list[Tensor]:
        """The blocks of G (..., rows, columns), equal ones together: each (..., I, J, h, w)."""
        return [tile.mT for strip in bd.pieces(G, self.height) for tile in bd.pieces(strip.mT, self.width)]

    def join(self, tiles: Sequence[Tensor]) -> Tensor:
        """The inverse of `cut`."""
        return bd.together([bd.together([tile.mT for tile in strip]).mT for strip in self._strips(tiles)])

    def of_rows(self, S: Tensor) -> list[Tensor]:
        """What is stored for rows, (..., J, rows, c), block by block in the order of `cut`: each (..., I, J, h, c)."""
        strips = [strip.transpose(-4, -3) for strip in bd.pieces(S, self.height)]
        return [tile for strip in strips for tile in strip.split(_counts(self.columns, self.width), dim=-3)]

    def of_columns(self, S: Tensor) -> list[Tensor]:
        """What is stored for columns, (..., I, columns, c), in the same order: each (..., I, J, w, c)."""
        groups = [group.split(_counts(self.rows, self.height), dim=-4) for group in bd.pieces(S, self.width)]
        return [tile for strip in zip(*groups, strict=True) for tile in strip]

    def stored_rows(self, tiles: Sequence[Tensor]) -> Tensor:
        """The inverse of `of_rows`; narrower ones get columns of zeros."""
        strips = [torch.cat(_level(strip), dim=-3).transpose(-4, -3) for strip in self._strips(tiles)]
        return bd.together(_level(strips))

    def stored_columns(self, tiles: Sequence[Tensor]) -> Tensor:
        """The inverse of `of_columns`."""
        groups = [torch.cat(_level(group), dim=-4) for group in zip(*self._strips(tiles), strict=True)]
        return bd.together(_level(groups))

    def _strips(self, tiles: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """Tiles that stand side by side."""
        across = len(_counts(self.columns, self.width))
        return [tiles[i : i + across] for i in range(0, len(tiles), across)]


def square(tiles: Sequence[Tensor]) -> list[Tensor]:
    """Of what is stored for rows or columns, the square matrices: the zeros beside those of smaller blocks cut off."""
    return [tile[..., : tile.shape[-2]] for tile in tiles]


def _counts(size: int, block: int) -> list[int]:
    """How many whole blocks a side has, and one if something is left."""
    return [count for count in (size // block, int(size % block > 0)) if count]


def _level(tiles: Sequence[Tensor]) -> list[Tensor]:
    """All as wide as the widest, by zeros."""
    widest = max(tile.shape[-1] for tile in tiles)
    return [t if t.shape[-1] == widest else torch.nn.functional.pad(t, (0, widest - t.shape[-1])) for t in tiles]


__all__ = ["BlockGrid", "square"]
