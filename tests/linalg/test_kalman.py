"""Descent that is a Kalman filter."""

from __future__ import annotations

from decimal import Decimal, localcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from poise.linalg.kalman import descend, step_matrix

SIZES = [(3, 7), (6, 4), (5, 5), (1, 3)]
STEPS = [1, 2, 5, 17]


def draw(m: int, n: int, seed: int = 0) -> dict[str, Tensor]:
    """A prior mean and covariance, an observation and its covariance."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def covariance(k: int) -> Tensor:
        root = normal(k, k)
        return root @ root.T / k + 0.3 * torch.eye(k, dtype=torch.float64)

    return {"w": normal(n), "P": covariance(n), "y": normal(m), "H": normal(m, n), "R": covariance(m)}


def posterior(w: Tensor, P: Tensor, y: Tensor, H: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance by the Kalman filter's equations."""
    gain = P @ H.T @ torch.linalg.inv(H @ P @ H.T + R)
    return w + gain @ (y - H @ w), P - gain @ H @ P


@pytest.mark.parametrize("m, n", SIZES)
@pytest.mark.parametrize("steps", STEPS)
def test_k_steps_end_at_the_kalman_posterior_mean(m: int, n: int, steps: int) -> None:
    given = draw(m, n)
    w, P, y, H, R = (given[name] for name in ("w", "P", "y", "H", "R"))
    found = descend(w, y, step_matrix(P, H, R, steps), H, R, steps)
    assert float((found - posterior(w, P, y, H, R)[0]).abs().max()) < 1e-13


@pytest.mark.parametrize("steps", [1, 5])
def test_without_a_noise_covariance_it_is_the_identity(steps: int) -> None:
    given = draw(3, 5)
    w, P, y, H = (given[name] for name in ("w", "P", "y", "H"))
    found = descend(w, y, step_matrix(P, H, steps=steps), H, steps=steps)
    assert float((found - posterior(w, P, y, H, torch.eye(3).double())[0]).abs().max()) < 1e-13


@pytest.mark.parametrize("m, n", SIZES)
def test_for_one_step_it_is_the_posterior_covariance(m: int, n: int) -> None:
    given = draw(m, n)
    w, P, y, H, R = (given[name] for name in ("w", "P", "y", "H", "R"))
    assert torch.allclose(step_matrix(P, H, R, 1), posterior(w, P, y, H, R)[1], rtol=0, atol=1e-13)


@pytest.mark.parametrize("steps", STEPS)
def test_it_diagonalizes_prior_precision_and_information_together(steps: int) -> None:
    """The published form: A = P^-1 = L L^T, L^-1 B L^-T = Z diag(p) Z^T, X = L^-T Z."""
    given = draw(7, 4)
    P, H, R = (given[name] for name in ("P", "H", "R"))
    A, B = torch.linalg.inv(P), H.T @ torch.linalg.inv(R) @ H
    L = torch.linalg.cholesky(A)
    inverse = torch.linalg.inv(L)
    p, Z = torch.linalg.eigh(inverse @ B @ inverse.T)
    X = inverse.T @ Z
    assert torch.allclose(X.T @ A @ X, torch.eye(4).double(), rtol=0, atol=1e-12)
    wanted = X @ torch.diag((1 - (1 + p) ** (-1 / steps)) / p) @ X.T
    assert torch.allclose(step_matrix(P, H, R, steps), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("free", [0.0, 1.0, 50.0])
def test_what_it_does_where_nothing_is_observed_does_not_change_the_weights(free: float) -> None:
    given = draw(3, 7)
    w, P, y, H, R = (given[name] for name in ("w", "P", "y", "H", "R"))
    M = step_matrix(P, H, R, 5)
    null = torch.linalg.svd(H).Vh[3:]
    found = descend(w, y, M + free * null.T @ null, H, R, 5)
    assert float((found - posterior(w, P, y, H, R)[0]).abs().max()) < 1e-12


@pytest.mark.parametrize("scale", [1e-12, 1e-8, 1e-4, 1.0, 1e4])
@pytest.mark.parametrize("steps", [2, 17])
def test_observations_of_any_precision_keep_their_digits(scale: float, steps: int) -> None:
    """One number of unit variance seen through noise of variance 1 / p: lam = (1 - (1 + p)^(-1/K)) / p, in exact arithmetic."""
    one = torch.ones(1, 1, dtype=torch.float64)
    found = step_matrix(one, one, one / scale, steps)
    with localcontext(prec=60):
        p = Decimal(1) / Decimal(float(one / scale))
        wanted = (1 - (-(1 + p).ln() / steps).exp()) / p
        assert abs(Decimal(float(found)) / wanted - 1) < Decimal("1e-14")


def test_a_precise_and_a_vague_observation_beside_each_other_are_both_used() -> None:
    """A threshold on p relative to its largest would take the vague one for unseen."""
    H = torch.diag(torch.tensor([1e7, 0.3], dtype=torch.float64))
    w, y, P = torch.tensor([0.0, 1.0]).double(), torch.tensor([1e7, 0.0]).double(), torch.eye(2).double()
    found = descend(w, y, step_matrix(P, H, steps=5), H, steps=5)
    assert float(found[1]) == pytest.approx(1 / 1.09, rel=1e-12)


def test_a_stack_is_solved_one_by_one() -> None:
    both = [draw(3, 5, seed) for seed in (0, 1)]
    stacked = {name: torch.stack([one[name] for one in both]) for name in both[0]}
    M = step_matrix(stacked["P"], stacked["H"], stacked["R"], 4)
    w = descend(stacked["w"], stacked["y"], M, stacked["H"], stacked["R"], 4)
    for i, one in enumerate(both):
        alone = step_matrix(one["P"], one["H"], one["R"], 4)
        assert torch.allclose(M[i], alone, rtol=0, atol=1e-13)
        assert torch.allclose(w[i], descend(one["w"], one["y"], alone, one["H"], one["R"], 4), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": 0}, "steps=0"),
        ({"P": -torch.eye(4)}, "P: must be symmetric and positive definite"),
        ({"R": torch.zeros(2, 2)}, "R: must be symmetric and positive definite"),
        ({"P": torch.ones(4, 3)}, r"P: shape \(4, 3\)"),
        ({"H": torch.ones(2, 3)}, r"H: shape \(2, 3\)"),
        ({"R": torch.eye(3)}, r"R: shape \(3, 3\)"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"P": torch.eye(4), "H": torch.ones(2, 4), "R": torch.eye(2), **change}
    with pytest.raises(ValueError, match=message):
        step_matrix(**given)
