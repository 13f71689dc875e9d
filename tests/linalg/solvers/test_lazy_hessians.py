"""Lazy Hessians (Second-Order Optimization with Lazy Hessians, arXiv 2212.00781)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conformance.cases import mutated
from torch import Tensor, nn

from poise import catalog
from poise.linalg.solvers.lazy_hessians import Minimum, lazy_newton


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


INPUTS = normal(60, 20)
CLASSES = torch.where(INPUTS @ normal(20, seed=1) + 2 * normal(60, seed=2) > 0, 1.0, -1.0)
START = torch.zeros(20, dtype=torch.float64)


def logistic(w: Tensor) -> Tensor:
    return nn.functional.softplus(-CLASSES * (INPUTS @ w)).mean() + 1e-2 * w.square().sum() / 2


def bent(x: Tensor) -> Tensor:
    """Not convex, with saddles."""
    return x.cos().sum() + (x @ torch.linspace(0.1, 0.4, len(x)).to(x)).square() + 0.05 * x.pow(4).sum()


def reference(f: Any, x: Tensor, M: float, m: int, regularization: str, steps: int) -> Tensor:
    """The formula, with the length of a cubic step found by Newton's method on its equation of one number."""
    H = x
    one = torch.eye(len(x), dtype=torch.float64)
    for k in range(steps):
        g = torch.func.grad(f)(x)
        if k % m == 0:
            H = torch.func.hessian(f)(x)
        if regularization == "quadratic":
            x = x - torch.linalg.solve(H + torch.sqrt(M * g.norm()) * one, g)
            continue
        least = float(torch.linalg.eigvalsh(H)[0])
        low, high = max(0.0, -2 * least / M), 1e6
        for _ in range(200):
            r = (low + high) / 2
            h = -torch.linalg.solve(H + (M * r / 2) * one, g)
            low, high = (r, high) if float(h.norm()) > r else (low, r)
        x = x + h  # pyright: ignore[reportPossiblyUnboundVariable]
    return x


def solve(f: Any, x: Tensor, M: float, m: int | None = None, **settings: Any) -> Minimum:
    return lazy_newton(f, x, M, m, **settings)


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("f, regularization", [(logistic, "cubic"), (logistic, "quadratic"), (bent, "cubic")])
def test_it_is_the_formula_and_with_m_1_the_ordinary_method(f: Any, regularization: Any, m: int) -> None:
    x = 0.3 * normal(20, seed=3) if f is logistic else normal(5, seed=4)
    found = solve(f, x, 2.0, m, regularization=regularization, maxiter=7)
    assert (found.x - reference(f, x, 2.0, m, regularization, 7)).abs().max() < 1e-9
    assert (found.iterations, found.hessians) == (7, math.ceil(7 / m))


def test_the_reference_tells_it_from_its_mutant() -> None:
    wrong = mutated(catalog.get("lazy-hessians"))
    x = 0.3 * normal(20, seed=3)
    found = wrong(logistic, x, 2.0, 3, maxiter=7)
    assert (found.x - reference(logistic, x, 2.0, 3, "cubic", 7)).abs().max() > 1e-4


@pytest.mark.parametrize("regularization", ["cubic", "quadratic"])
def test_a_quadratic_has_one_path_whatever_the_age_of_its_hessian(regularization: Any) -> None:
    root = normal(6, 6)
    H = root @ root.mT + 0.1 * torch.eye(6, dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        return x @ H @ x / 2 - x.sum()

    for steps in (1, 4, 9):
        paths = [solve(f, START[:6], 1.0, m, regularization=regularization, maxiter=steps).x for m in (1, 2, 5, 100)]
        assert max(float((x - paths[0]).abs().max()) for x in paths) < 1e-12


@pytest.mark.parametrize("regularization", ["cubic", "quadratic"])
def test_few_hessians_do_the_work_of_many(regularization: Any) -> None:
    each = {m: solve(logistic, START, 0.01, m, regularization=regularization) for m in (1, 5, 20)}
    assert all(found.converged and found.gradient_norm < 1e-9 for found in each.values())
    assert all(found.hessians == math.ceil(found.iterations / m) for m, found in each.items())
    assert each[20].hessians < each[5].hessians < each[1].hessians
    assert each[1].iterations <= each[5].iterations <= each[20].iterations < 60
    assert each[20].hessians <= 3
    assert (each[1].x - each[20].x).abs().max() < 1e-7

    x, steps = START, 0
    lr = 1 / float(torch.linalg.eigvalsh(torch.func.hessian(logistic)(START))[-1])
    while float((g := torch.func.grad(logistic)(x)).norm()) >= 1e-9:
        x, steps = x - lr * g, steps + 1
    assert steps > 10 * each[20].iterations


def saddle(p: Tensor) -> Tensor:
    x, y = p
    return x**2 - y**2 + y**4


@pytest.mark.parametrize("start", [[1.0, 0.0], [0.0, 0.0], [1e-12, 0.0]], ids=["beside", "on", "all but on"])
@pytest.mark.parametrize("settings", [{"m": 1}, {"m": 2}, {"m": 3, "adaptive": True}], ids=str)
def test_a_strict_saddle_is_left(start: list[float], settings: dict[str, Any]) -> None:
    found = lazy_newton(saddle, torch.tensor(start, dtype=torch.float64), 24.0, **settings)
    assert found.converged
    assert abs(float(found.x[1])) == pytest.approx(1 / math.sqrt(2), abs=1e-8) and abs(float(found.x[0])) < 1e-8


def test_a_minimum_as_a_start_costs_one_hessian_that_says_so() -> None:
    found = lazy_newton(saddle, torch.tensor([0.0, 0.5**0.5], dtype=torch.float64), 1.0)
    assert (found.iterations, found.hessians, found.converged) == (0, 1, True)


def test_the_adaptive_method_finds_M_from_far_off() -> None:
    for M in (1e-6, 1.0, 1e6):
        for f, x in ((logistic, START), (bent, normal(5, seed=4))):
            found = lazy_newton(f, x, M, adaptive=True)
            assert found.converged and found.iterations < 400
            assert torch.linalg.eigvalsh(torch.func.hessian(f)(found.x))[0] > 0


def test_a_phase_that_does_not_keep_its_promise_is_taken_back() -> None:
    """Newton's own step on sqrt(1 + x^2) from 3 goes to -27, and on to ever larger ones."""

    def f(x: Tensor) -> Tensor:
        return (1 + x.square()).sqrt().sum()

    x = torch.tensor([3.0], dtype=torch.float64)
    assert f(lazy_newton(f, x, 1e-12, 1, maxiter=1).x) > 20
    found = lazy_newton(f, x, 1e-12, 1, adaptive=True)
    assert found.converged and abs(float(found.x)) < 1e-8
    assert found.iterations > found.hessians  # what was taken back cost no Hessian


def test_at_the_saddle_of_a_quadratic_the_adaptive_test_passes_for_any_M() -> None:
    """With 1 in the place of 0.2 it passes for none: decrease over bound is 1/sqrt(2)."""

    def f(x: Tensor) -> Tensor:
        return x[1] ** 2 - x[0] ** 2

    for M in (1e-2, 1.0, 1e4):
        found = lazy_newton(f, torch.zeros(2, dtype=torch.float64), M, 1, adaptive=True, maxiter=1)
        assert abs(float(found.x[0])) == pytest.approx(4 / M)


def test_the_weights_of_a_model_and_float32() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 2), nn.Tanh(), nn.Linear(2, 1))

    def f(weights: dict[str, Tensor]) -> Tensor:
        scores = torch.func.functional_call(model, weights, (INPUTS.float(),))[:, 0]
        decay = sum(w.square().sum() for w in weights.values())
        return nn.functional.softplus(-CLASSES.float() * scores).mean() + 1e-2 * decay

    found = lazy_newton(f, dict(model.named_parameters()), 1.0, 10, adaptive=True, tol=1e-4)
    assert found.converged and found.x["0.weight"].shape == (2, 20) and found.x["2.bias"].dtype == torch.float32
    assert found.value < float(f(dict(model.named_parameters())).detach())
    assert not found.x["0.weight"].requires_grad


def test_a_given_hessian_is_used() -> None:
    asked: list[int] = []

    def hessian(w: Tensor) -> Tensor:
        asked.append(1)
        return torch.func.hessian(logistic)(w)

    found = lazy_newton(logistic, START, 0.01, 5, hessian=hessian)
    assert len(asked) == found.hessians and torch.equal(found.x, lazy_newton(logistic, START, 0.01, 5).x)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"M": 0.0}, r"M=0\.0"),
        ({"m": 0}, "m=0"),
        ({"regularization": "quartic"}, "regularization='quartic': must be one of cubic, quadratic"),
        ({"regularization": "quadratic", "adaptive": True}, "the adaptive method takes cubic steps"),
        ({"regularization": "quadratic", "f": saddle, "x": START[:2] + 0.1}, "quadratic regularization is for convex f"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lazy_newton(**({"f": logistic, "x": START + 1} | change))


def test_the_catalog_knows_it_as_a_solver_with_a_path_that_imports() -> None:
    entry = catalog.get("lazy-hessians")
    assert (entry.family, entry.kind, entry.target) == ("linalg", "solver", lazy_newton)
