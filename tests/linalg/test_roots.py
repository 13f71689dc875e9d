"""Inverse roots of positive semidefinite matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from poise.linalg.roots import Damping, coupled_newton, inverse_root


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spread(n: int, condition: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Eigenvalues from 1 down to 1 / condition, and an orthogonal basis."""
    values = torch.logspace(0, -torch.tensor(condition).log10().item(), n, dtype=torch.float64)
    return values, torch.linalg.qr(draw(n, n, seed=seed)).Q


def power(values: Tensor, Q: Tensor, exponent: float) -> Tensor:
    return (Q * values**exponent) @ Q.mT


def gap(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_both_ways_give_the_inverse_root(p: int) -> None:
    values, Q = spread(20, 1e3)
    A, wanted = power(values, Q, 1.0), power(values, Q, -1 / p)
    assert gap(inverse_root(A, 1 / p, eps=0.0), wanted) < 1e-12
    assert gap(coupled_newton(A, p, tolerance=1e-12), wanted) < 1e-9


def test_each_matrix_of_a_batch_is_the_matrix_alone() -> None:
    """Newton's iterations are counted for each: one that is done does not move on."""
    A = torch.stack([power(*spread(8, c, seed=i), 1.0) for i, c in enumerate((1.0, 1e2, 1e5))])
    for root in (lambda M: inverse_root(M, 0.25), lambda M: coupled_newton(M, 4)):
        for whole, alone in zip(root(A), (root(M) for M in A), strict=True):
            assert torch.allclose(whole, alone, rtol=0, atol=1e-12 * float(alone.norm()))


def test_the_smallest_eigenvalue_moves_all_of_them_up_to_eps_and_only_where_it_is_less() -> None:
    values, Q = torch.tensor([0.5, 0.1, -0.02, 1e-3], dtype=torch.float64), torch.linalg.qr(draw(4, 4)).Q
    found = inverse_root(power(values, Q, 1.0), 0.5, eps=0.01)
    assert gap(found, power(values + 0.03, Q, -0.5)) < 1e-12
    positive = values.abs() + 0.02
    assert gap(inverse_root(power(positive, Q, 1.0), 0.5, eps=0.01), power(positive, Q, -0.5)) < 1e-12


def test_added_eps_moves_every_eigenvalue_by_itself() -> None:
    values, Q = torch.tensor([0.5, 0.1, 1e-3, 0.0], dtype=torch.float64), torch.linalg.qr(draw(4, 4)).Q
    found = inverse_root(power(values, Q, 1.0), 0.25, eps=0.01, damping="add")
    assert gap(found, power(values + 0.01, Q, -0.25)) < 1e-12


@pytest.mark.parametrize("condition, bound", [(1e4, 2e-4), (1e6, 2e-2)])
def test_float32_matrices_are_taken_apart_in_float64(condition: float, bound: float) -> None:
    """What is left is what rounding the matrix itself does."""
    values, Q = spread(100, condition)
    A = power(values, Q, 1.0).float()
    wanted = power(*(lambda e: (e.eigenvalues, e.eigenvectors))(torch.linalg.eigh(A.double())), -0.25)
    assert gap(inverse_root(A, 0.25), wanted) < 1e-6
    assert gap(inverse_root(A, 0.25), power(values, Q, -0.25)) < bound


def test_newton_in_float32_stops_where_rounding_takes_over() -> None:
    """Left alone, the iteration goes away from the root again: at a condition of 1e8 by orders of magnitude."""
    values, Q = spread(60, 1e8)
    found = coupled_newton(power(values, Q, 1.0).float(), 4, tolerance=0.0)
    assert found.isfinite().all()
    assert gap(found, power(values, Q, -0.25)) < 0.5
    values, Q = spread(60, 1e4)
    assert gap(coupled_newton(power(values, Q, 1.0).float(), 4), power(values, Q, -0.25)) < 1e-3


def test_of_float32_zeros_the_root_is_that_of_the_rounding_of_the_largest_eigenvalue() -> None:
    """A gradient's moments of low rank: what the zeros have become in float32 says nothing, and eps = 1e-12 is below it."""
    G = draw(7, 1).float()
    g = G / G.norm()
    found = inverse_root(G @ G.mT, 0.5) @ G
    assert gap(found, g.double()) < 1e-3


def test_a_matrix_that_is_not_finite_gives_nan_and_spoils_no_other() -> None:
    A = torch.stack([power(*spread(4, 10.0), 1.0)] * 2)
    A[1, 0, 0] = torch.inf
    for found in (inverse_root(A, 0.25), coupled_newton(A, 4)):
        assert found[0].isfinite().all()
        assert found[1].isnan().all()


def test_zeros_have_the_root_of_eps() -> None:
    kinds: tuple[Damping, ...] = ("floor", "add")
    for damping in kinds:
        assert gap(inverse_root(torch.zeros(3, 3).double(), 0.5, 1e-4, damping), 100 * torch.eye(3).double()) < 1e-12
    assert gap(coupled_newton(torch.zeros(3, 3).double(), 2, ridge=1e-4), 100 * torch.eye(3).double()) < 1e-5


def test_bad_settings_are_named() -> None:
    A = torch.eye(2)
    with pytest.raises(ValueError, match="exponent=0"):
        inverse_root(A, 0.0)
    with pytest.raises(ValueError, match="eps=-1"):
        inverse_root(A, 0.5, eps=-1.0)
    with pytest.raises(ValueError, match="damping='much'"):
        inverse_root(A, 0.5, damping="much")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="p=0"):
        coupled_newton(A, 0)
