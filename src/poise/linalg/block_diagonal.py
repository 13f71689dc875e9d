"""Block-diagonal square matrices, kept as the rows of their blocks.

A matrix of n rows in blocks of b is stored as (..., n, b): row i holds row i of the block it belongs to. The last block takes
the rows that are left, and leaves the rest of its columns zero. With b = n it is the plain matrix, and b numbers a row are all
that is ever stored, so that a shard by rows is a shard of the matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pieces(G: Tensor, b: int) -> list[Tensor]:
    """The rows of G (..., n, c) cut as the blocks are: (..., n // b, b, c), and (..., 1, rest, c) if b does not divide n."""
    whole = G.shape[-2] // b * b
    cut = [G[..., :whole, :].unflatten(-2, (-1, b))] if whole else []
    return cut if whole == G.shape[-2] else [*cut, G[..., whole:, :].unsqueeze(-3)]


def together(cut: list[Tensor]) -> Tensor:
    """The inverse of `pieces`."""
    rows = [piece.flatten(-3, -2) for piece in cut]
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=-2)


def blocks(A: Tensor) -> list[Tensor]:
    """The square blocks of a stored matrix: (..., n // b, b, b), and the last one of fewer rows."""
    return [piece[..., : piece.shape[-2]] for piece in pieces(A, A.shape[-1])]


def stored(square: list[Tensor], b: int) -> Tensor:
    """The inverse of `blocks`."""
    return together([torch.nn.functional.pad(one, (0, b - one.shape[-1])) for one in square])


def gram(G: Tensor, b: int) -> Tensor:
    """The blocks of `G G^T`, stored."""
    return stored([piece @ piece.mT for piece in pieces(G, b)], b)


def multiply(A: Tensor, G: Tensor, *, transpose: bool = False) -> Tensor:
    """`A G`, or `A^T G`, for a stored A of G's rows."""
    cut = zip(blocks(A), pieces(G, A.shape[-1]), strict=True)
    return together([(block.mT if transpose else block) @ piece for block, piece in cut])


__all__ = ["blocks", "gram", "multiply", "pieces", "stored", "together"]
