"""Leading singular triplets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from poise.linalg.truncated import singular_triplets


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_without_a_sketch_it_is_exact() -> None:
    M = drawn(2, 7, 5)
    U, s, Vh = singular_triplets(M)
    torch.testing.assert_close(U @ torch.diag_embed(s) @ Vh, M)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (3, 30, 20)])
def test_a_sketch_finds_all_of_a_matrix_of_its_rank(shape: tuple[int, ...]) -> None:
    *batch, m, n = shape
    M = drawn(*batch, m, 4) @ drawn(*batch, 4, n, seed=1)
    U, s, Vh = singular_triplets(M, drawn(*batch, n, 6, seed=2), iterations=0)
    torch.testing.assert_close(U @ torch.diag_embed(s) @ Vh, M)
    torch.testing.assert_close(s[..., :4], torch.linalg.svdvals(M)[..., :4])
    torch.testing.assert_close(U.mT @ U, torch.eye(6, dtype=torch.float64).expand(*batch, 6, 6), rtol=0, atol=1e-12)


def test_iterations_find_more_of_a_flat_spectrum() -> None:
    M = torch.sign(drawn(60, 40))
    best = torch.linalg.svdvals(M)[:8].square().sum()

    def missed(iterations: int) -> float:
        return float(1 - singular_triplets(M, drawn(40, 12, seed=3), iterations)[1][:8].square().sum() / best)

    assert missed(0) > 0.1 > 0.01 > missed(10) > 0
