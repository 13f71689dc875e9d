"""Least squares and pseudo-inverses of any rank and in any units."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from poise.linalg.least_squares import least_squares, symmetric_pinv


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


UNITS = torch.logspace(-40, 40, 5, dtype=torch.float64)


def test_the_residual_stands_at_right_angles_to_every_column() -> None:
    A, B = normal(20, 5), normal(20, 3, seed=1)
    assert float((A.mT @ (B - A @ least_squares(A, B))).abs().max()) < 1e-13


def test_units_of_the_columns_make_no_difference() -> None:
    A, B = normal(20, 5), normal(20, 3, seed=1)
    assert torch.allclose(least_squares(A * UNITS, B) * UNITS[:, None], least_squares(A, B), rtol=1e-10)


@pytest.mark.parametrize("rows", [3, 20])
def test_of_several_solutions_the_shortest_is_taken(rows: int) -> None:
    A, B = normal(rows, 5), normal(rows, 3, seed=1)
    A = A / A.norm(dim=0)  # so that lengths are compared in the units given
    A = torch.cat([A, A[:, :1], torch.zeros(rows, 1, dtype=A.dtype)], 1)
    assert torch.allclose(least_squares(A, B), torch.linalg.pinv(A) @ B, rtol=1e-8, atol=1e-12)


def test_the_inverse_of_what_there_is_has_the_four_properties_of_penrose() -> None:
    F = normal(3, 5)
    M = F.mT @ F
    P = symmetric_pinv(M)
    assert torch.allclose(M @ P @ M, M, atol=1e-10)
    assert torch.allclose(P @ M @ P, P, atol=1e-10)
    assert torch.allclose(symmetric_pinv(M * UNITS * UNITS[:, None]) * UNITS * UNITS[:, None], P, rtol=1e-8)
    regular = M + torch.eye(5, dtype=M.dtype)
    assert torch.allclose(symmetric_pinv(regular), torch.linalg.inv(regular), rtol=1e-10)


def test_a_zero_row_and_column_stay_zero() -> None:
    M = torch.diag(torch.tensor([4.0, 0.0, 1e-30], dtype=torch.float64))
    assert torch.allclose(symmetric_pinv(M).diagonal(), torch.tensor([0.25, 0.0, 1e30], dtype=torch.float64))
