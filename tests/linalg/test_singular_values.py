"""Singular values by three ways."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from poise.linalg import singular_values


def matrix(rows: int, columns: int, condition: float = 1e3) -> tuple[Tensor, Tensor]:
    """A matrix in float64 and its singular values, from 1 down to 1 / condition."""
    generator = torch.Generator().manual_seed(rows * columns)
    k = min(rows, columns)
    U = torch.linalg.qr(torch.randn(rows, k, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(columns, k, generator=generator, dtype=torch.float64)).Q
    values = torch.logspace(0, -torch.tensor(condition).log10().item(), k, dtype=torch.float64)
    return U * values @ V.T, values


@pytest.mark.parametrize("shape", [(40, 25), (25, 40), (1, 7), (7, 1)])
@pytest.mark.parametrize("way", [singular_values.exact, singular_values.gram])
def test_all_values_of_a_matrix_that_is_made_of_them(way: object, shape: tuple[int, int]) -> None:
    M, values = matrix(*shape)
    torch.testing.assert_close(way(M), values, rtol=1e-9, atol=0)  # pyright: ignore[reportCallIssue]


def test_the_gram_matrix_is_the_same_in_blocks_of_any_width() -> None:
    M, values = matrix(30, 90)
    torch.testing.assert_close(singular_values.gram(M.float(), block=7), values, rtol=1e-3, atol=0)


def test_a_gram_matrix_drowns_what_lies_below_1e_8() -> None:
    M, values = matrix(20, 20, condition=1e12)
    torch.testing.assert_close(singular_values.exact(M), values, rtol=1e-3, atol=0)
    found = singular_values.gram(M)
    torch.testing.assert_close(found[:8], values[:8], rtol=1e-5, atol=0)
    assert float(found[-1]) > 10 * float(values[-1]) or float(found[-1]) == 0


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
def test_lanczos_finds_the_largest_of_a_matrix_without_a_gap(shape: tuple[int, int]) -> None:
    M = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    true = torch.linalg.svdvals(M.double())[:8]
    found = singular_values.lanczos(M, 8)
    torch.testing.assert_close(found[0], true[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[:6], true[:6], rtol=1e-3, atol=0)
    assert bool((found <= true * (1 + 1e-6)).all())  # lower bounds


def test_lanczos_of_a_matrix_of_low_rank_and_of_zeros_ends() -> None:
    generator = torch.Generator().manual_seed(2)
    M = torch.randn(60, 3, generator=generator) @ torch.randn(3, 50, generator=generator)
    found = singular_values.lanczos(M, 8)
    torch.testing.assert_close(found[:3], torch.linalg.svdvals(M.double())[:3], rtol=1e-5, atol=0)
    assert float(found[3:].max()) < 1e-4 * float(found[0])
    assert singular_values.lanczos(torch.zeros(5, 4), 3).tolist() == [0.0]


def test_lanczos_of_a_small_matrix_is_exact_and_seeded() -> None:
    M, values = matrix(12, 9)
    torch.testing.assert_close(singular_values.lanczos(M, 9), values, rtol=1e-8, atol=0)
    assert torch.equal(singular_values.lanczos(M, 4), singular_values.lanczos(M, 4))
