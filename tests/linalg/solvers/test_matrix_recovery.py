"""Global Convergence of Sub-gradient Method for Robust Matrix Recovery (arXiv 2202.08788)."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from conformance.cases import mutated
from torch import Tensor

from poise import catalog
from poise.linalg.solvers.matrix_recovery import robust_recovery


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@cache
def problem(outliers: float = 0.2) -> tuple[Tensor, Tensor, Tensor]:
    """1500 Gaussian measurements of a matrix of rank 2 and norm 1 in 20 dimensions, a fifth of them wrong by about 10."""
    V = torch.linalg.qr(normal(20, 2, seed=0)).Q * torch.tensor([1.0, 0.8]).double().sqrt()
    X = V @ V.T
    A = normal(1500, 20, 20, seed=1)
    y = torch.einsum("mij,ij->m", A, X)
    wrong = torch.rand(1500, generator=torch.Generator().manual_seed(2)) < outliers
    return A, torch.where(wrong, y + 10 * normal(1500, seed=3), y), X


def error(rank: int = 2, recover: Any = robust_recovery, **hyper: Any) -> float:
    A, y, X = problem()
    return float((recover(A, y, rank, **hyper).matrix - X).norm() / X.norm())


def test_with_a_fifth_of_the_measurements_wrong_it_is_found_whatever_rank_is_allowed() -> None:
    exact, whole = error(2), error(20)
    assert exact < 1e-3 and whole < 1e-3
    assert whole < 1.5 * exact


def test_squares_would_fit_what_is_wrong() -> None:
    """The mutant is the method with squared errors; its best over the steps is far from the matrix."""
    wrong = mutated(catalog.get("robust-matrix-recovery"))
    assert error(20, wrong, lr=0.1) > 0.4


def test_only_a_tiny_start_finds_it_with_more_columns_than_it_has_rank() -> None:
    tiny = error(20)
    large = error(20, start=normal(20, 20, seed=4) / 20**0.5)
    coarse = error(20, alpha=1e-2)
    assert large > 20 * tiny
    assert 4 * tiny < coarse < large


def test_what_is_left_in_the_end_falls_with_alpha() -> None:
    """With steps enough; the smaller it is, the later the growth is over."""
    ends = [error(20, alpha=alpha, steps=700) for alpha in (1e-2, 1e-4, 1e-6)]
    assert ends[1] < 0.02 * ends[0] and ends[2] < 0.1 * ends[1]


def test_a_step_is_the_subgradient_of_the_mean_absolute_error() -> None:
    A, y, _ = problem()
    start = normal(20, 3, seed=5)
    U = start.clone().requires_grad_()
    for t in range(3):
        loss = (torch.einsum("mij,ij->m", A, U @ U.T) - y).abs().mean()
        (slope,) = torch.autograd.grad(loss, U)
        U = (U - 0.3 * 0.9**t * slope).detach().requires_grad_()
    found = robust_recovery(A, y, 3, lr=0.3, decay=0.9, steps=3, start=start)
    assert (found.U - U.detach()).abs().max() < 1e-12
    assert len(found.losses) == 4
    assert found.losses[-1] == pytest.approx(float((torch.einsum("mij,ij->m", A, found.matrix) - y).abs().mean()))


def test_it_begins_at_alpha_times_the_best_positive_part_of_the_signs() -> None:
    A, y, _ = problem()
    B = robust_recovery(A, y, 4, steps=0, alpha=1e-3).U / 1e-3
    C = sum(torch.sign(y[i]) * (A[i] + A[i].T) / 2 for i in range(len(y))) / len(y)
    values, V = torch.linalg.eigh(C)
    kept = torch.where((values > 0) & (torch.arange(20) >= 16), values, 0.0)
    assert (B @ B.T - V * kept @ V.T).abs().max() < 1e-12


def test_without_wrong_measurements_constant_steps_end_near_too() -> None:
    A, y, X = problem(0.0)
    found = robust_recovery(A, y, 5, lr=0.05, decay=1.0, steps=1000)
    assert float((found.matrix - X).norm() / X.norm()) < 0.05


@pytest.mark.parametrize(
    "change, message",
    [
        ({"A": torch.ones(4, 3, 2)}, r"A, y: shapes \(4, 3, 2\)"),
        ({"y": torch.ones(3)}, "A, y: shapes"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 4}, "rank=4"),
        ({"lr": 0.0}, "lr=0"),
        ({"decay": 1.1}, r"decay=1\.1"),
        ({"alpha": 0.0}, "alpha=0"),
        ({"steps": -1}, "steps=-1"),
        ({"start": torch.ones(3, 2)}, "start: shape"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        robust_recovery(**({"A": torch.ones(4, 3, 3), "y": torch.ones(4), "rank": 1} | change))


def test_the_catalog_knows_it_as_a_solver() -> None:
    found = catalog.get("robust-matrix-recovery")
    assert (found.family, found.kind) == ("linalg", "solver")
    assert found.target is robust_recovery
