"""Regularized minimal-polynomial extrapolation."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from poise.linalg.extrapolation import limit_weights


def recurrence(degree: int, count: int = 6, size: int = 12) -> tuple[list[Tensor], Tensor]:
    """x <- A x + b, whose differences span `degree` dimensions; the first terms, and the fixed point."""
    generator = torch.Generator().manual_seed(degree)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    eigenvalues = torch.linspace(-0.6, 0.8, degree, dtype=torch.float64)
    A = basis[:, :degree] * eigenvalues @ basis[:, :degree].T
    fixed = torch.randn(size, generator=generator, dtype=torch.float64)
    x = fixed + basis[:, :degree].sum(1)
    terms = [x]
    for _ in range(count - 1):
        x = fixed + A @ (x - fixed)
        terms.append(x)
    return terms, fixed


def limit(terms: list[Tensor], ridge: float) -> Tensor:
    U = torch.stack([b - a for a, b in itertools.pairwise(terms)], dim=1)
    return torch.stack(terms[:-1], dim=1) @ limit_weights(U.T @ U, ridge)


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_an_affine_recurrence_of_low_degree_is_followed_to_its_end(degree: int) -> None:
    terms, fixed = recurrence(degree)
    assert (terms[-1] - fixed).norm() > 0.05
    assert (limit(terms, 1e-15) - fixed).norm() < 1e-9
    assert (limit(terms, 1e-4) - fixed).norm() > (limit(terms, 1e-10) - fixed).norm()


def test_as_many_dimensions_as_differences_are_too_many() -> None:
    terms, fixed = recurrence(5)
    assert (limit(terms, 1e-15) - fixed).norm() > 1e-3


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_scale_of_the_sequence_makes_no_difference(scale: float) -> None:
    gram = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = gram @ gram.T
    assert torch.allclose(limit_weights(scale * gram, 1e-3), limit_weights(gram, 1e-3), rtol=1e-10)


def test_the_weights_sum_to_one_and_are_equal_where_nothing_changes() -> None:
    assert torch.allclose(limit_weights(torch.zeros(5, 5)), torch.full((5,), 0.2, dtype=torch.float64))
    gram = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float(limit_weights(gram @ gram.T, 1e-3).sum()) == pytest.approx(1.0, abs=1e-14)
