"""Matrices in a grid of blocks, and what is stored for the rows and columns of each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from poise.linalg.block_grid import BlockGrid, square

SIZES = [(6, 6, 6), (6, 6, 3), (7, 5, 3), (7, 9, 4), (2, 9, 4), (9, 2, 4), (5, 1, 2), (1, 1, 3)]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def blocks(G: Tensor, b: int) -> dict[tuple[int, int], Tensor]:
    m, n = G.shape[-2:]
    return {(i, j): G[..., i : i + b, j : j + b] for i in range(0, m, b) for j in range(0, n, b)}


@pytest.mark.parametrize("m, n, b", SIZES)
def test_the_grid_holds_every_block_once_and_gives_the_matrix_back(m: int, n: int, b: int) -> None:
    grid, G = BlockGrid(m, n, b), draw(2, m, n)
    tiles = grid.cut(G)
    assert torch.equal(grid.join(tiles), G)
    norms = torch.cat([t.square().sum((-2, -1)).flatten(1) for t in tiles], dim=1).sort(-1).values
    wanted = torch.stack([block.square().sum((-2, -1)) for block in blocks(G, b).values()], dim=-1).sort(-1).values
    assert torch.allclose(norms, wanted, rtol=1e-14, atol=0)


@pytest.mark.parametrize("m, n, b", SIZES)
def test_what_is_stored_for_rows_and_columns_belongs_to_its_block(m: int, n: int, b: int) -> None:
    """Products of a block's rows, stored, are with row i of the matrix in place i, one column of blocks after another."""
    grid, G = BlockGrid(m, n, b), draw(m, n)
    tiles = grid.cut(G)
    L, R = grid.stored_rows([t @ t.mT for t in tiles]), grid.stored_columns([t.mT @ t for t in tiles])
    assert L.shape == grid.row_shape(grid.height)
    assert R.shape == grid.column_shape(grid.width)
    for (i, j), block in blocks(G, b).items():
        h, w = block.shape
        assert torch.allclose(L[j // b, i : i + h, :h], block @ block.T, rtol=0, atol=1e-14)
        assert torch.allclose(R[i // b, j : j + w, :w], block.T @ block, rtol=0, atol=1e-14)
    for t, left, right in zip(tiles, square(grid.of_rows(L)), square(grid.of_columns(R)), strict=True):
        assert torch.equal(left, t @ t.mT)
        assert torch.equal(right, t.mT @ t)


def test_a_stack_is_cut_matrix_by_matrix() -> None:
    grid, G = BlockGrid(7, 5, 3), draw(2, 4, 7, 5)
    for whole, alone in zip(grid.cut(G), grid.cut(G[1, 2]), strict=True):
        assert torch.equal(whole[1, 2], alone)
    L = grid.stored_rows([t @ t.mT for t in grid.cut(G)])
    assert torch.allclose(L[1, 2], grid.stored_rows([t @ t.mT for t in grid.cut(G[1, 2])]), rtol=0, atol=1e-14)
