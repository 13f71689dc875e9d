"""Eigenvectors, found once and then followed."""

from __future__ import annotations

import torch
from torch import Tensor

from poise.linalg.eigenbasis import eigenbasis, power_step


def spectrum(values: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A symmetric matrix with these eigenvalues, and its eigenvectors."""
    n = len(values)
    Q = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q
    return Q @ torch.diag(values) @ Q.T, Q


VALUES = torch.tensor([9.0, 5.0, 4.0, 2.0, 0.5], dtype=torch.float64)


def test_eigenvectors_come_as_columns_largest_eigenvalue_first() -> None:
    S, Q = spectrum(VALUES)
    assert torch.allclose((eigenbasis(S).T @ Q).abs(), torch.eye(5).double(), rtol=0, atol=1e-12)


def test_what_is_not_finite_gives_nan_for_its_own_matrix_only() -> None:
    S, _ = spectrum(VALUES)
    found = eigenbasis(torch.stack([S, torch.full_like(S, float("inf")), S]))
    assert found[1].isnan().all()
    assert torch.equal(found[0], eigenbasis(S)) and torch.equal(found[2], found[0])


def test_steps_converge_on_the_eigenvectors_from_any_basis() -> None:
    S, Q = spectrum(VALUES)
    _, found = spectrum(VALUES, seed=1)
    for _ in range(80):
        found, _ = power_step(S, found)
        assert torch.allclose(found.T @ found, torch.eye(5).double(), rtol=0, atol=1e-12)
    assert torch.allclose((found.T @ Q).abs(), torch.eye(5).double(), rtol=0, atol=1e-6)


def test_a_step_puts_eigenvectors_in_order_and_says_where_each_came_from() -> None:
    S, Q = spectrum(VALUES)
    shuffled = torch.tensor([3, 0, 4, 1, 2])
    found, order = power_step(torch.stack([S, S]), torch.stack([Q[:, shuffled], Q]))
    assert torch.equal(order[0], torch.argsort(shuffled)) and torch.equal(order[1], torch.arange(5))
    assert torch.allclose((found[0].T @ Q).abs(), torch.eye(5).double(), rtol=0, atol=1e-12)


def test_zero_leaves_an_orthogonal_basis() -> None:
    zero = torch.zeros(4, 4)
    for basis in (eigenbasis(zero), power_step(zero, torch.eye(4))[0]):
        assert torch.allclose(basis.T @ basis, torch.eye(4))
