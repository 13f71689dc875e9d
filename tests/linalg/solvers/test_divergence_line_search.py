"""Exploring an Alternative Line-Search Method for Lagrange-Newton Optimization (arXiv 2601.08431)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conformance.cases import mutated
from torch import Tensor

from poise import catalog
from poise.linalg.solvers.divergence_line_search import experimental_newton, newton_divergence, share


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def on_the_circle(z: Tensor) -> Tensor:
    """The Lagrangian of min x^4 + y^2 + x y over the unit circle."""
    x, y, multiplier = z
    return x**4 + y**2 + x * y + multiplier * (x**2 + y**2 - 1)


def rough(z: Tensor) -> Tensor:
    return torch.sin(z).prod() + (z**4).sum() / 10 + torch.exp(z[0] * z[1])


def tau(f: Any, x: Tensor) -> float:
    return float(newton_divergence(f, x)[1])


def divergence(f: Any, x: Tensor) -> float:
    """-1/n times the trace of the Jacobian of the Newton step, which autograd takes through the inverse."""

    def step(x: Tensor) -> Tensor:
        return -torch.linalg.solve(torch.func.hessian(f)(x), torch.func.grad(f)(x))

    return -float(torch.func.jacrev(step)(x).trace()) / len(x)


@pytest.mark.parametrize("f", [on_the_circle, rough], ids=["circle", "rough"])
@pytest.mark.parametrize("seed", range(4))
def test_the_closed_form_is_the_divergence_of_the_step(f: Any, seed: int) -> None:
    x = normal(3, seed=seed)
    assert tau(f, x) == pytest.approx(divergence(f, x), rel=1e-11, abs=1e-11)
    assert abs(tau(f, x) - 1) > 1e-3
    nu, _ = newton_divergence(f, x)
    assert (nu + torch.linalg.solve(torch.func.hessian(f)(x), torch.func.grad(f)(x))).abs().max() < 1e-10


def test_on_quadratics_it_is_one_and_one_step_is_the_solution() -> None:
    H, b = normal(5, 5), normal(5, seed=1)
    H = H + H.T

    def f(x: Tensor) -> Tensor:
        return x @ H @ x / 2 + b @ x

    for seed in range(3):
        assert tau(f, 10 * normal(5, seed=seed)) == 1.0
    found = experimental_newton(f, normal(5, seed=9))
    assert found.iterations <= 2 and found.gradient < 1e-10
    assert (H @ found.x + b).abs().max() < 1e-10


@pytest.mark.parametrize("seed", [2, 4])
def test_at_stationary_points_it_is_one(seed: int) -> None:
    end = experimental_newton(on_the_circle, normal(3, seed=seed), damped=False)
    assert end.gradient < 1e-10
    assert tau(on_the_circle, end.x) == pytest.approx(1.0, abs=1e-9)


def test_but_not_on_the_way_to_one_where_the_hessian_is_singular() -> None:
    """Near the minimum of x^4 Newton's step is -x / 3. At (1, 1, -3 / sqrt 2) / sqrt 2 the circle's Hessian has a zero."""
    assert tau(lambda x: x[0] ** 4, torch.tensor([1e-3]).double()) == pytest.approx(1 / 3)
    H = torch.func.hessian(on_the_circle)(torch.tensor([0.5**0.5, 0.5**0.5, -1.5], dtype=torch.float64))
    assert float(torch.linalg.eigvalsh(H).abs().min()) < 1e-12


def starts(count: int) -> list[Tensor]:
    return list(2 * normal(count, 3, seed=11))


def test_where_the_hessian_stays_regular_both_arrive_and_where_it_does_not_the_damped_one_creeps() -> None:
    """Of 50 starts the plain method arrives from all, 22 times at a singular point; the damped from 30, in 60 steps."""
    arrived = 0
    for z in starts(5):
        plain, damped = (experimental_newton(on_the_circle, z, damped=how, limit=30) for how in (False, True))
        assert plain.gradient < 1e-10
        assert float(plain.x[:2].norm()) == pytest.approx(1.0, abs=1e-9)
        if damped.gradient < 1e-10:
            arrived += 1
        else:
            assert float(damped.x[0] * damped.x[1]) == pytest.approx(0.5, abs=0.1), "the point of the test above"
    assert 1 <= arrived <= 4


def test_steps_are_damped_outside_the_ravine_only_and_to_where_the_criterion_is_smaller() -> None:
    damped = 0
    for z in starts(6):
        nu, at = newton_divergence(on_the_circle, z)
        here = (float(at) - 1) ** 2
        t = share(on_the_circle, z, nu, float(at), 1e-6)
        values = [(tau(on_the_circle, z + nu / 2**j) - 1) ** 2 for j in range(11)]
        if t < 1.0:
            damped += 1
            j = round(-math.log2(t))
            assert values[j] <= here and values[j] <= values[j + 1]
            assert not any(values[i] <= here and values[i] <= values[i + 1] for i in range(j))
        assert share(on_the_circle, z, nu, float(at), here) == 1.0
    assert damped >= 1


def test_a_singular_hessian_gives_a_finite_step() -> None:
    """x^4 + y at x = 0: nothing is curved."""
    for f, x in (
        (lambda z: z[0] ** 4 + z[1], torch.zeros(2).double()),
        (lambda z: z[0] ** 2 + z[1] + z[1] ** 3, torch.tensor([1.0, 0.0]).double()),
    ):
        nu, at = newton_divergence(f, x)
        assert bool(nu.isfinite().all()) and bool(at.isfinite())


def test_its_tests_tell_it_from_its_mutant() -> None:
    wrong = mutated(catalog.get("experimental-divergence-line-search")).__globals__["newton_divergence"]
    x = normal(3)
    assert abs(float(wrong(rough, x)[1]) - divergence(rough, x)) > 1e-3


def test_impossible_settings_are_refused_by_name() -> None:
    x = torch.zeros(3)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tol": 0.0}, "tol=0"),
        ({"limit": -1}, "limit=-1"),
        ({"slack": -1.0}, "slack=-1"),
    ]
    for hyper, message in cases:
        with pytest.raises(ValueError, match=message):
            experimental_newton(on_the_circle, x, **hyper)
    with pytest.raises(ValueError, match="x: must be a vector"):
        experimental_newton(on_the_circle, torch.zeros(3, 1))


def test_the_catalog_marks_it_as_experimental() -> None:
    found = catalog.get("experimental-divergence-line-search")
    assert (found.family, found.kind) == ("linalg", "solver")
    assert found.summary.startswith("Experimental")
