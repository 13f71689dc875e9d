"""Block-diagonal matrices stored by their rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from poise.linalg import block_diagonal as bd


def whole(A: Tensor) -> Tensor:
    """The square matrix that is stored, entry by entry."""
    n, b = A.shape
    full = torch.zeros(n, n, dtype=A.dtype)
    for i in range(n):
        first = i // b * b
        for j in range(first, min(first + b, n)):
            full[i, j] = A[i, j - first]
    return full


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


SIZES = [(6, 6), (6, 3), (7, 3), (7, 4), (5, 1), (1, 1)]


@pytest.mark.parametrize("n, b", SIZES)
def test_products_are_those_of_the_matrix_that_is_stored(n: int, b: int) -> None:
    A, G = bd.stored(bd.blocks(draw(n, b)), b), draw(n, 5)
    assert torch.allclose(bd.multiply(A, G), whole(A) @ G, rtol=0, atol=1e-14)
    assert torch.allclose(bd.multiply(A, G, transpose=True), whole(A).T @ G, rtol=0, atol=1e-14)


@pytest.mark.parametrize("n, b", SIZES)
def test_a_gram_matrix_keeps_the_products_of_rows_in_one_block(n: int, b: int) -> None:
    G = draw(n, 5)
    mask = torch.arange(n)[:, None] // b == torch.arange(n)[None, :] // b
    assert torch.allclose(whole(bd.gram(G, b)), (G @ G.T) * mask, rtol=0, atol=1e-14)


@pytest.mark.parametrize("n, b", SIZES)
def test_cutting_and_putting_together_are_inverse_and_a_stack_is_cut_matrix_by_matrix(n: int, b: int) -> None:
    G = draw(2, 3, n, 5)
    assert torch.equal(bd.together(bd.pieces(G, b)), G)
    A = bd.gram(G, b)
    assert A.shape == (2, 3, n, b)
    assert torch.equal(bd.stored(bd.blocks(A), b), A)
    assert torch.allclose(A[1, 2], bd.gram(G[1, 2], b), rtol=0, atol=1e-14)
    assert torch.allclose(bd.multiply(A, G)[1, 2], bd.multiply(A[1, 2], G[1, 2]), rtol=0, atol=1e-13)
