"""Sums over tensors that come in pieces, the same bit for bit whatever the pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .protocol import Place

ENTRIES = 1 << 16


class Blocks:
    """Rows that come in pieces of any size, cut anew into blocks that depend on the tensor's shape alone.

    Sums of floating-point numbers depend on how they are grouped; sums of sums over these blocks do not depend on how the rows
    came. One instance for one pass over rows in order. At most one block is held back.
    """

    def __init__(self) -> None:
        self._held: list[Tensor] = []

    def cut(self, place: Place, rows: Sequence[Tensor]) -> Iterator[tuple[Place, list[Tensor]]]:
        """The blocks that these rows complete, in new float64 tensors of two dimensions, (rows, entries of one)."""
        width = place.per_row
        pieces = [t.reshape(-1, width) if t.numel() else t.new_empty(0, width) for t in rows]
        before = self._held[0].shape[0] if self._held else 0
        if before:
            pieces = [torch.cat([held, new]) for held, new in zip(self._held, pieces, strict=True)]
        count, first = pieces[0].shape[0], place.start - before
        high = place.shape[0] if place.shape else 1
        block = max(1, ENTRIES // max(width, 1))
        whole = count if first + count == high else count // block * block
        for start in range(0, whole, block):
            at = first + start
            here = replace(place, start=at, offset=place.offset + (at - place.start) * width)
            # copied: what a product is may hang on where in memory it begins
            yield here, [p[start : min(start + block, whole)].to(torch.float64, copy=True) for p in pieces]
        self._held = [p[whole:].clone() for p in pieces] if whole < count else []
