"""Accelerated Infeasibility Detection of Constrained Optimization and Fixed-Point Iterations (arXiv 2303.15876)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conformance.cases import mutated
from torch import Tensor

from poise import catalog
from poise.linalg.solvers.halpern import displacement, residual_bound

Map = Callable[[Tensor], Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def half_space(a: Tensor, c: float) -> Map:
    """Projection on <a, x> <= c."""
    return lambda x: x - a * ((a @ x - c).clamp_min(0) / (a @ a))


def douglas_rachford(A: Map, B: Map) -> Map:
    return lambda x: x - A(x) + B(2 * A(x) - x)


def gap(width: float, d: int = 3) -> Map:
    """x_1 <= 0 and x_1 >= width."""
    e = torch.zeros(d, dtype=torch.float64)
    e[0] = 1.0
    return douglas_rachford(half_space(e, 0.0), half_space(-e, -width))


def test_on_a_translation_every_estimate_is_the_displacement_from_the_first_step_on() -> None:
    v, x0 = normal(4), normal(4, seed=1)
    for steps in (2, 3, 10, 57):
        for scheme in ("halpern", "plain"):
            found = displacement(lambda x: x - v, x0, steps, scheme=scheme)
            assert (found.by_iterate - v).abs().max() < 4e-15 * steps
            assert (found.by_residual - v).abs().max() < 4e-15 * steps
            assert found.verdict == "infeasible"


def test_of_two_half_spaces_that_do_not_meet_it_is_the_gap() -> None:
    found = displacement(gap(1.0), normal(3, seed=2), 200)
    for estimate in (found.by_iterate, found.by_residual):
        assert (estimate - torch.tensor([-1.0, 0.0, 0.0]).double()).abs().max() < 0.03
    assert found.verdict == "infeasible"
    zero = displacement(gap(1.0), torch.zeros(3).double(), 200)
    for estimate in (zero.by_iterate, zero.by_residual):
        assert (estimate - torch.tensor([-1.0, 0.0, 0.0]).double()).abs().max() < 1e-12


def test_of_sets_that_meet_it_goes_to_zero() -> None:
    lengths = [float(displacement(gap(-1.0), normal(3, seed=2), steps).by_iterate.norm()) for steps in (50, 500, 2500)]
    assert lengths[1] < 0.11 * lengths[0] and lengths[2] < 0.21 * lengths[1]
    x0 = 3 + normal(3, seed=2)
    assert displacement(gap(-1.0), x0, 50).verdict == "undecided"
    assert displacement(gap(-1.0), x0, 3000, tol=0.01).verdict == "feasible"
    assert displacement(lambda x: x, normal(3)).verdict == "feasible"


def rotations(d: int = 40) -> Map:
    """Half the identity and half a rotation by many angles near 0, and a translation that no point undoes."""
    angles = torch.logspace(-3, 0, d // 2, dtype=torch.float64)
    c, s = angles.cos(), angles.sin()

    def T(x: Tensor) -> Tensor:
        a, b, rest = x[: d // 2], x[d // 2 : d], x[d:]
        return torch.cat([(a + c * a - s * b) / 2, (b + s * a + c * b) / 2, rest - 0.3])

    return T


def test_the_error_of_halperns_residual_falls_faster_than_the_plain_ones() -> None:
    """Squared, as 1 / n^2 against 1 / n, on an averaged rotation of as many speeds as there are orders of n."""
    T, x0 = rotations(), torch.ones(41, dtype=torch.float64)
    v = torch.zeros(41).double()
    v[-1] = 0.3
    steps = (30, 100, 300, 1000)
    slopes = {}
    for scheme in ("halpern", "plain"):
        errors = [float((displacement(T, x0, n, scheme=scheme).by_residual - v).square().sum()) for n in steps]
        slopes[scheme] = math.log(errors[-1] / errors[0]) / math.log(steps[-1] / steps[0])
    assert slopes["halpern"] < -1.7
    assert slopes["plain"] > slopes["halpern"] + 0.4


def instances() -> Iterator[tuple[Map, Tensor, Tensor, Tensor]]:
    """T, a start, v, and a point x* with x* - T x* = v."""
    for seed in range(30):
        M, c, x0 = torch.linalg.qr(normal(6, 6, seed=seed)).Q, normal(6, seed=100 + seed), normal(6, seed=200 + seed)
        if seed % 3 == 1:
            M = M * torch.rand(6, generator=torch.Generator().manual_seed(seed)).double()
        if seed % 3 == 2:  # 1 is an eigenvalue, twice: no fixed point
            Q = torch.linalg.qr(normal(6, 6, seed=seed)).Q
            M = Q @ torch.block_diag(torch.eye(2).double(), torch.linalg.qr(normal(4, 4, seed=seed + 1)).Q) @ Q.T
        shift = torch.eye(6).double() - M
        at = torch.linalg.pinv(shift, rtol=1e-9) @ c
        yield lambda x, M=M, c=c: M @ x + c, x0, shift @ at - c, at
    for seed in range(10):
        x0 = 2 * normal(3, seed=seed)
        at = torch.cat([torch.zeros(1).double(), x0[1:]])
        yield gap(0.5 + seed / 5), x0, torch.tensor([-(0.5 + seed / 5), 0.0, 0.0], dtype=torch.float64), at


def test_the_bound_holds_for_affine_maps_and_for_projections_at_every_step() -> None:
    worst = 0.0
    for T, x0, v, at in instances():
        assert (at - T(at) - v).norm() < 1e-9
        x, distance = x0, float((x0 - at).norm())
        for n in range(1, 101):
            x = x0 / (n + 1) + n / (n + 1) * T(x)
            error = float((x - T(x) - v).norm())
            worst = max(worst, error / residual_bound(n, distance))
            if n in (2, 10, 100):
                assert (displacement(T, x0, n).by_residual - (x - T(x))).abs().max() < 1e-12
    assert 0.1 < worst <= 1.0


def test_the_bound_at_25_steps_is_the_published_one_and_above_the_known_worst_case() -> None:
    assert residual_bound(25) ** 2 == pytest.approx(0.03664, abs=5e-6)
    assert residual_bound(25) ** 2 > 0.02679
    harmonic = sum(1 / i for i in range(1, 26))
    assert ((math.sqrt(harmonic + 4) + 1) / 26) ** 2 < 0.02679, "with 4 in the place of 12 it would be refuted"
    assert residual_bound(7, 3.0) == pytest.approx(3 * residual_bound(7))


def test_its_tests_tell_it_from_its_mutant() -> None:
    wrong = mutated(catalog.get("infeasibility-detection"))
    v = normal(4)
    assert (wrong(lambda x: x - v, torch.zeros(4).double(), 10).by_iterate - v).abs().max() > 0.01


@pytest.mark.parametrize(
    "hyper, message",
    [
        ({"steps": 1}, "steps=1"),
        ({"scheme": "mann"}, "scheme='mann'"),
        ({"tol": 0.0}, "tol=0"),
        ({"settled": 0.0}, "settled=0"),
    ],
)
def test_impossible_settings_are_refused_by_name(hyper: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        displacement(lambda x: x, torch.zeros(2), **hyper)


def test_the_catalog_knows_it_as_a_diagnostic() -> None:
    found = catalog.get("infeasibility-detection")
    assert (found.family, found.kind) == ("linalg", "diagnostic")
    assert found.target is displacement
