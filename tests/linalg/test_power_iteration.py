"""A matrix as a product of two thin ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from poise.linalg.power_iteration import power_step


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (2, 3, 6, 9)])
def test_with_as_many_columns_as_the_rank_the_product_is_the_matrix(shape: tuple[int, ...]) -> None:
    M = draw(*shape)
    r = min(shape[-2:])
    P, Q = power_step(M, draw(*shape[:-2], shape[-1], r, seed=1))
    assert float((P @ Q.mT - M).abs().max()) < 1e-12
    assert float((P.mT @ P - torch.eye(r, dtype=M.dtype)).abs().max()) < 1e-12


def test_steps_on_one_matrix_find_its_leading_singular_vectors() -> None:
    M, Q = draw(8, 12), draw(12, 2, seed=1)
    for _ in range(200):
        _, Q = power_step(M, Q)
    P, Q = power_step(M, Q)
    U, S, Vh = torch.linalg.svd(M)
    assert float((P @ Q.mT - (U[:, :2] * S[:2]) @ Vh[:2]).abs().max()) < 1e-8


def test_a_start_of_zeros_is_left_again() -> None:
    """As after a gradient of zeros: a start made of them would be kept for ever by Gram-Schmidt."""
    M = draw(5, 7)
    Q = torch.zeros(7, 2, dtype=M.dtype)
    P, Q = power_step(torch.zeros_like(M), Q)
    P, Q = power_step(M, Q)
    assert float((P @ Q.mT).norm()) > 0.1
    assert float((P.mT @ P - torch.eye(2, dtype=M.dtype)).abs().max()) < 1e-12
