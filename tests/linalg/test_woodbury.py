"""Damped low-rank solves against the dense inverse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from poise.linalg.woodbury import coefficients, damped_solve, row_weights


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(G: Tensor, x: Tensor, lam: float, c: float) -> Tensor:
    return torch.linalg.solve(lam * torch.eye(x.shape[-1], dtype=x.dtype) + c * G.mT @ G, x[..., None])[..., 0]


def gap(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("m, d", [(1, 7), (5, 40), (16, 60), (9, 9), (12, 5)])
@pytest.mark.parametrize("lam, c", [(1e-3, 1.0), (0.5, 1 / 16), (7.0, 2.0)])
def test_it_equals_the_dense_solve(m: int, d: int, lam: float, c: float) -> None:
    G, x = draw(m, d), draw(d, seed=1)
    assert gap(damped_solve(G, x, lam, c), dense(G, x, lam, c)) < 1e-11


def test_batches_are_solved_one_by_one() -> None:
    G, x = draw(3, 2, 4, 10), draw(3, 2, 10, seed=1)
    assert gap(damped_solve(G, x, 0.1), dense(G, x, 0.1, 1.0)) < 1e-12


def test_a_row_of_its_own_window_is_only_shrunk() -> None:
    """Where a difference of two nearly equal vectors would leave nothing: damping far below float32's share of |g|^2."""
    g = draw(30)
    for times in (1, 5):
        window = g.expand(times, -1)
        wanted = g / (0.01 + times * (g @ g))
        assert gap(window.mT @ row_weights(window @ window.mT, times - 1, 0.01), wanted) < 1e-11
        window = window.float()
        found = window.mT @ row_weights(window @ window.mT, times - 1, 1e-9)
        assert gap(found.double(), g / (1e-9 + times * (g @ g))) < 1e-6


def test_products_whose_rounding_left_negative_eigenvalues_are_solved_all_the_same() -> None:
    """As of five equal rows in float32: a Gram matrix that no Cholesky factorization takes."""
    gram = torch.full((3, 3), 9.0) + torch.tensor([[0.0, 1e-5, 0.0], [1e-5, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert float(torch.linalg.eigvalsh(gram.double()).amin()) < -1e-6
    weights = row_weights(gram, 0, 1e-9)
    assert abs(float(weights.sum()) - 1 / 27) < 1e-5


@pytest.mark.parametrize("lam, c", [(1e-3, 1.0), (0.5, 1 / 16)])
def test_a_row_solved_by_weights_is_the_row_solved(lam: float, c: float) -> None:
    G = draw(16, 60)
    assert gap(G.mT @ row_weights(G @ G.mT, 3, lam, c), dense(G, G[3], lam, c)) < 1e-11


def test_order_and_rows_of_zeros_make_no_difference() -> None:
    G, x = draw(6, 20), draw(20, seed=1)
    wanted = damped_solve(G, x, 0.1, 1 / 8)
    padded = torch.cat([G[[3, 1, 0]], torch.zeros(2, 20, dtype=G.dtype), G[[5, 4, 2]]])
    assert gap(damped_solve(padded, x, 0.1, 1 / 8), wanted) < 1e-13


def test_float32_rows_that_are_nearly_the_same_lose_few_digits() -> None:
    base = draw(400).float()
    G = base + 1e-3 * draw(32, 400, seed=2).float()
    x = G[0] + 0.1 * draw(400, seed=3).float()
    assert gap(damped_solve(G, x, 1e-3, 1 / 32).double(), dense(G.double(), x.double(), 1e-3, 1 / 32)) < 1e-4


def test_what_is_not_finite_gives_nan_and_bad_settings_are_named() -> None:
    G, x = draw(3, 6), draw(6, seed=1)
    G[1, 2] = torch.inf
    assert damped_solve(G, x, 0.1).isnan().all()
    with pytest.raises(ValueError, match="lam=0"):
        coefficients(G @ G.mT, G @ x, 0.0)
    with pytest.raises(ValueError, match="c=-1"):
        row_weights(G @ G.mT, 0, 0.1, -1.0)
    with pytest.raises(ValueError, match="length"):
        damped_solve(G, x[:5], 0.1)
