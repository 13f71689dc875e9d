"""Even convex functions: value, gradient, conjugate (Lion Secretly Solves Constrained Optimization, arXiv 2310.05898)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from poise.linalg import norms
from poise.linalg.kappa import ENTRIES, KAPPAS, Kappa

SMOOTH = ("huber", "softsign", "logcosh")


def kappa(name: str, **options: Any) -> Kappa:
    return Kappa(name, **{"delta": 0.7, "top": 0.3, "method": "svd", **options})


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def numerical(one: Kappa, x: Tensor) -> Tensor:
    """Central differences, entry by entry."""
    h, slopes = 1e-6, []
    for i in range(x.numel()):
        step = torch.zeros(x.numel(), dtype=x.dtype)
        step[i] = h
        slopes.append((one.value(x + step.view_as(x)) - one.value(x - step.view_as(x))) / (2 * h))
    return torch.stack(slopes).view_as(x)


@pytest.mark.parametrize("name", KAPPAS)
def test_the_gradient_is_that_of_the_value(name: str) -> None:
    x = gaussian(4, 6)
    assert torch.allclose(kappa(name).gradient(x), numerical(kappa(name), x), atol=1e-7)


@pytest.mark.parametrize("name", KAPPAS)
def test_value_and_conjugate_add_up_to_the_inner_product_exactly_at_the_gradient(name: str) -> None:
    x, others = gaussian(3, 4, 6), gaussian(3, 4, 6, seed=1)
    one = kappa(name)
    y = one.gradient(x)
    assert torch.allclose(one.value(x) + one.conjugate(y), norms.inner(x, y), rtol=1e-12)
    assert bool((one.value(others) + one.conjugate(0.999 * y) > norms.inner(others, 0.999 * y)).all())


@pytest.mark.parametrize("name", KAPPAS)
def test_it_is_even_convex_and_zero_at_zero(name: str) -> None:
    one, x, y = kappa(name), gaussian(40, 4, 6), gaussian(40, 4, 6, seed=1)
    assert torch.allclose(one.value(-x), one.value(x), rtol=1e-13)
    assert torch.allclose(one.gradient(-x), -one.gradient(x), atol=1e-12)
    assert bool((one.value((x + y) / 2) <= (one.value(x) + one.value(y)) / 2 + 1e-12).all())
    zero = torch.zeros(4, 6, dtype=torch.float64)
    assert float(one.value(zero)) == float(one.conjugate(zero)) == 0.0
    assert torch.equal(one.gradient(zero), zero)


@pytest.mark.parametrize("name", [name for name in KAPPAS if name != "squared_l2"])
def test_the_conjugate_is_a_wall_around_all_gradients(name: str) -> None:
    y = kappa(name).gradient(gaussian(4, 6))
    peak = y / y.abs().max() if name in SMOOTH else y
    assert math.isfinite(float(kappa(name).conjugate(0.999 * peak)))
    assert math.isinf(float(kappa(name).conjugate(1.001 * peak)))


@pytest.mark.parametrize("name", SMOOTH)
def test_a_narrow_smooth_one_is_the_sign_and_a_wide_one_is_linear(name: str) -> None:
    x = gaussian(4, 6)
    assert torch.allclose(kappa(name, delta=1e-9).gradient(x), x.sign(), atol=1e-6)
    assert torch.allclose(1e6 * kappa(name, delta=1e6).gradient(x), x, rtol=1e-5)


def test_large_entries_overflow_nowhere() -> None:
    x = torch.tensor([[-1e30, 1e30]])
    for name in ("huber", "softsign", "logcosh"):
        assert torch.equal(kappa(name, delta=1e-3).gradient(x), x.sign())
        assert float(kappa(name, delta=1e-3).value(x)) == pytest.approx(2e30)


def test_top_k_takes_the_signs_of_the_largest_entries() -> None:
    x = torch.tensor([[5.0, -1.0, 0.5], [-4.0, 3.0, 2.0]])
    assert kappa("top_k", top=0.5).gradient(x).tolist() == [[1, 0, 0], [-1, 1, 0]]
    assert float(kappa("top_k", top=0.5).value(x)) == 12.0
    assert torch.equal(kappa("top_k", top=1.0).gradient(x), x.sign())
    assert kappa("top_k", top=1e-9).gradient(x).tolist() == [[1, 0, 0], [0, 0, 0]]


def test_known_values() -> None:
    x = torch.tensor([[0.5, -3.0]], dtype=torch.float64)
    assert float(kappa("huber", delta=1.0).value(x)) == pytest.approx(0.125 + 2.5)
    assert float(kappa("softsign", delta=1.0).value(x)) == pytest.approx(3.5 - math.log(1.5) - math.log(4.0))
    assert float(kappa("logcosh", delta=1.0).value(x)) == pytest.approx(math.log(math.cosh(0.5) * math.cosh(3.0)))
    assert float(kappa("squared_l2").value(x)) == pytest.approx(4.625)
    assert set(ENTRIES) == {"squared_l2", *SMOOTH}


@pytest.mark.parametrize(
    "options, named",
    [
        ({"name": "l3"}, "kappa='l3'"),
        ({"name": "huber", "delta": 0.0}, "delta=0.0"),
        ({"name": "huber", "delta": math.inf}, "delta=inf"),
        ({"name": "top_k", "top": 0.0}, "top=0.0"),
        ({"name": "top_k", "top": 1.5}, "top=1.5"),
        ({"name": "nuclear", "method": "newton"}, "method='newton'"),
        ({"name": "nuclear", "steps": 0}, "steps=0"),
    ],
)
def test_what_it_does_not_know_is_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Kappa(**options)
