"""Polynomial preconditioning (Polynomial Preconditioning for Gradient Methods, arXiv 2301.13194)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance.cases import mutated
from torch import Tensor

from poise import catalog
from poise.linalg.solvers.polynomial_preconditioning import Composite, polynomial_gradient
from poise.linalg.symmetric_polynomials import polynomial


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


VALUES = torch.cat([torch.tensor([1e3, 100.0]), 1 + 0.1 * torch.arange(20)]).double()
Q = torch.linalg.qr(normal(22, 22)).Q
B = Q @ torch.diag(VALUES) @ Q.mT
C = normal(22, seed=1)
START = torch.zeros(22, dtype=torch.float64)


def bowl(x: Tensor) -> Tensor:
    return x @ B @ x / 2 - C @ x


def steps(tau: int, **settings: Any) -> int:
    found = polynomial_gradient(bowl, START, B, tau, **{"tol": 1e-6, "maxiter": 3000, **settings})
    assert found.converged
    assert (found.x - torch.linalg.solve(B, C)).abs().max() < 1e-5
    return found.iterations


def test_cut_gaps_are_fewer_steps() -> None:
    two, three = steps(2, M=1.05), steps(3, M=1.05)
    assert two > 1.5 * three
    assert not polynomial_gradient(bowl, START, B, 0, M=1.05, tol=1e-6, maxiter=3 * two).converged


def test_acceleration_takes_about_the_root_of_the_steps() -> None:
    plain, fast = (steps(2, M=1.05, step=step) for step in ("gradient", "accelerated"))
    assert fast < 0.5 * plain


@pytest.mark.parametrize("step", ["gradient", "accelerated", "krylov"])
def test_without_M_it_is_found(step: Any) -> None:
    assert steps(2, step=step) < 700


def test_a_krylov_step_of_full_degree_ends_a_quadratic_at_once() -> None:
    few = torch.linspace(1, 40, 8, dtype=torch.float64)
    R = torch.linalg.qr(normal(8, 8, seed=2)).Q
    H = R @ torch.diag(few) @ R.mT
    found = polynomial_gradient(lambda x: x @ H @ x / 2 - C[:8] @ x, START[:8], H, 7, step="krylov", M=1.0, maxiter=1)
    assert (found.x - torch.linalg.solve(H, C[:8])).abs().max() < 1e-12


def by_definition(g: Tensor, H: Tensor, tau: int) -> Tensor:
    """-sum a_i H^i g with K a = b, K_ij = <g, H^(i+j+1) g>, b_i = <g, H^i g>."""
    powers = [g]
    for _ in range(2 * tau + 1):
        powers.append(H @ powers[-1])
    K = torch.stack([torch.stack([g @ powers[i + j + 1] for j in range(tau + 1)]) for i in range(tau + 1)])
    a = torch.linalg.solve(K, torch.stack([g @ powers[i] for i in range(tau + 1)]))
    return -torch.stack([a[i] * powers[i] for i in range(tau + 1)]).sum(0)


H5 = torch.diag(torch.tensor([1.0, 1.5, 2.0, 3.0, 5.0], dtype=torch.float64))


def one_krylov_step(function: Any, tau: int) -> Tensor:
    return function(lambda x: x @ H5 @ x / 2 - C[:5] @ x, START[:5], H5, tau, step="krylov", M=2.0, maxiter=1).x


@pytest.mark.parametrize("tau", [0, 1, 2])
def test_a_krylov_step_is_the_formula_and_goes_below_every_fixed_polynomial(tau: int) -> None:
    assert torch.allclose(one_krylov_step(polynomial_gradient, tau), by_definition(-C[:5], H5, tau) / 2, rtol=1e-9)

    def f(x: Tensor) -> float:
        return float(x @ H5 @ x / 2 - C[:5] @ x)

    direction = polynomial(H5, tau) @ C[:5]
    best = (C[:5] @ direction) / (direction @ H5 @ direction) * direction
    found = polynomial_gradient(lambda x: x @ H5 @ x / 2 - C[:5] @ x, START[:5], H5, tau, step="krylov", M=1.0, maxiter=1).x
    assert f(found) <= f(best) + 1e-12


def test_the_formula_tells_it_from_its_mutant() -> None:
    wrong = mutated(catalog.get("polynomial-preconditioning"))
    assert (one_krylov_step(wrong, 2) - by_definition(-C[:5], H5, 2) / 2).abs().max() > 0.1


def test_a_gradient_step_is_the_formula() -> None:
    for tau in (0, 1, 3):
        P = polynomial(H5, tau, "eigenvalues")
        wanted = P @ C[:5] / (2 * torch.linalg.eigvals(H5 @ P).real.max())
        found = polynomial_gradient(lambda x: x @ H5 @ x / 2 - C[:5] @ x, START[:5], H5, tau, M=2.0, maxiter=1).x
        assert torch.allclose(found, wanted, rtol=1e-4)


def soft(v: Tensor, t: float) -> Tensor:
    return v.sign() * (v.abs() - 0.3 * t).relu()


@pytest.mark.parametrize("step", ["gradient", "accelerated"])
@pytest.mark.parametrize("M", [1.05, None])
def test_a_simple_term_is_taken_in_the_norm_of_the_inverse(step: Any, M: float | None) -> None:
    """Lasso: the conditions of its minimum, and fewer steps than the plain proximal method takes."""
    c = 3 * C

    def solve(tau: int, maxiter: int) -> Composite:
        return polynomial_gradient(
            lambda x: x @ B @ x / 2 - c @ x, START, B, tau, step=step, prox=soft, M=M, tol=1e-5, maxiter=maxiter
        )

    found = solve(2, 1000)
    assert found.converged and not solve(0, 2 * found.iterations).converged
    slope, zero = B @ found.x - c, found.x == 0
    assert 1 <= int(zero.sum()) < 22
    assert (slope[zero].abs() <= 0.3 + 1e-4).all() and (slope + 0.3 * found.x.sign())[~zero].abs().max() < 1e-4


def test_a_generalized_linear_model_by_products_alone_with_estimated_traces() -> None:
    """Logistic regression, x a matrix: B is A^T A, which is never formed."""
    A = normal(80, 12) @ torch.diag(torch.tensor([30.0, 8.0, *[1.0] * 10]).double())
    signs = torch.where(A[:, 2:] @ normal(10, seed=3) + normal(80, seed=4) > 0, 1.0, -1.0)

    def f(x: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-signs * (A @ x.reshape(12))).mean() + 0.005 * x.square().sum()

    def product(v: Tensor) -> Tensor:
        return (A.mT @ (A @ v.reshape(12)) / 80).reshape(v.shape)

    x = torch.zeros(3, 4, dtype=torch.float64)
    for tau in (0, 2):
        generator = torch.Generator().manual_seed(0)
        found = polynomial_gradient(f, x, product, tau, probes=200, generator=generator, tol=1e-6, maxiter=1000)
        if tau == 0:
            assert not found.converged
            continue
        assert found.converged and found.x.shape == (3, 4)
        assert torch.func.grad(f)(found.x).norm() < 1e-5
        assert found.iterations < 500


@pytest.mark.parametrize(
    "change, message",
    [
        ({"step": "newton"}, "step='newton': must be one of gradient"),
        ({"M": 0.0}, r"M=0\.0"),
        ({"step": "krylov", "prox": soft}, "prox: the steps of 'krylov'"),
        ({"B": torch.eye(3)}, "B: must be square and x a vector"),
        ({"tau": 22}, r"tau=22: must lie in 0 \.\. 21"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        polynomial_gradient(**{"f": bowl, "x": START, "B": B, **change})


def test_the_catalog_knows_it_as_a_solver_with_a_path_that_imports() -> None:
    entry = catalog.get("polynomial-preconditioning")
    assert (entry.family, entry.kind, entry.target) == ("linalg", "solver", polynomial_gradient)
