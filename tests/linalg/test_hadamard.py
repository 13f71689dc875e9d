"""Hadamard matrices and their fast transform."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from poise.linalg.hadamard import hadamard, hadamard_matrix, padded, supported

SIZES = [1, 2, 4, 64, 12, 24, 96, 20, 40, 28, 56, 224, 36, 44, 60, 76, 108, 140, 148, 180]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("n", SIZES)
def test_all_entries_have_one_size_and_rows_are_orthonormal(n: int) -> None:
    H = hadamard_matrix(n)
    torch.testing.assert_close(H.abs(), torch.full((n, n), n**-0.5, dtype=torch.float64), atol=1e-15, rtol=0)
    torch.testing.assert_close(H @ H.mT, torch.eye(n, dtype=torch.float64), atol=1e-13, rtol=0)


def test_powers_of_two_are_sylvesters() -> None:
    """`H_ij = (-1)^(number of ones in i & j) / sqrt(n)`."""
    signs = [[(-1) ** (i & j).bit_count() for j in range(16)] for i in range(16)]
    torch.testing.assert_close(hadamard_matrix(16), torch.tensor(signs, dtype=torch.float64) / 4)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_the_transform_is_the_product_with_the_matrix_along_any_dimension(n: int, dim: int) -> None:
    H = hadamard_matrix(n)
    shape = [3, 2, 5]
    shape[dim] = n
    x = draw(*shape)
    for inverse, matrix in ((False, H), (True, H.mT)):
        wanted = (matrix @ x.movedim(dim, -1)[..., None]).squeeze(-1).movedim(-1, dim)
        torch.testing.assert_close(hadamard(x, dim, inverse=inverse), wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dim", [0, 1])
def test_the_inverse_undoes_it(n: int, dim: int) -> None:
    x = draw(n, n)
    torch.testing.assert_close(hadamard(hadamard(x, dim), dim, inverse=True), x, atol=1e-13, rtol=0)
    torch.testing.assert_close(hadamard(hadamard(x, dim, inverse=True), dim), x, atol=1e-13, rtol=0)


def test_an_outlier_is_spread_evenly() -> None:
    x = torch.zeros(96)
    x[5] = 96**0.5
    torch.testing.assert_close(hadamard(x).abs(), torch.ones(96))


def test_bfloat16_is_computed_in_float32_and_rounded_once() -> None:
    x = draw(64, 24).bfloat16()
    assert torch.equal(hadamard(x), hadamard(x.float()).bfloat16())
    assert hadamard(x).dtype == torch.bfloat16


def test_sizes_that_are_missing_are_named_with_the_next_one() -> None:
    assert not supported(3) and not supported(6) and not supported(0)
    assert [padded(n) for n in (3, 13, 25, 29, 100, 344)] == [4, 16, 28, 32, 104, 352]
    assert all(supported(n) for n in SIZES)
    with pytest.raises(ValueError, match=r"x has 6 entries along dim 1.* next size is 8"):
        hadamard(torch.ones(4, 6), 1)


def test_a_size_is_split_at_its_smallest_order() -> None:
    """896 is 28 * 32, and not 224 * 4 or one dense product."""
    one = torch.zeros(896, dtype=torch.float64)
    one[1] = math.sqrt(896)
    signs = hadamard(one)
    torch.testing.assert_close(signs[:32], torch.tensor([1.0, -1.0]).double().repeat(16) * signs[0])
