"""Vectors predicted from vectors nearby."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from poise.linalg.gaussian_process import best_length_scale, matern52, predict, regression_weights, squared_distances


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_kernel_is_materns_of_order_five_halves() -> None:
    """Against its integral: the Fourier transform of `(1 + w^2 / 5)^-3`, scaled to 1 at distance 0."""
    w = torch.linspace(0, 400, 400001, dtype=torch.float64)
    density = (1 + w.square() / 5) ** -3
    for d in (0.0, 0.3, 1.0, 2.5):
        wanted = torch.trapezoid(density * torch.cos(w * d), w) / torch.trapezoid(density, w)
        assert float(matern52(torch.tensor(d * d).double())) == pytest.approx(float(wanted), abs=1e-8)
        assert float(matern52(torch.tensor(4 * d * d).double(), 2.0)) == pytest.approx(float(wanted), abs=1e-8)


@pytest.mark.parametrize("length_scale", [0.1, 1.0, 5.0])
def test_without_noise_a_known_point_is_predicted_as_it_is_known(length_scale: float) -> None:
    X, Y = normal(12, 6), normal(12, 9, seed=1)
    assert (predict(X, Y, X, length_scale, noise=1e-14) - Y).abs().max() < 1e-10
    assert (predict(X, Y, X, length_scale, noise=1e-3) - Y).abs().max() > 1e-5


def test_the_weights_are_those_of_the_formula() -> None:
    known = normal(7, 7)
    known, new = known @ known.T, normal(3, 7, seed=1)
    wanted = new @ torch.linalg.inv(known + 0.1 * torch.eye(7).double())
    assert (regression_weights(known, new, 0.1) - wanted).abs().max() < 1e-12


def test_far_from_every_known_point_the_prediction_is_zero() -> None:
    assert predict(normal(5, 3), normal(5, 2, seed=1), 1e3 + normal(4, 3)).abs().max() < 1e-100


def test_distances_of_points_that_are_close_together_and_far_from_zero_keep_their_digits() -> None:
    """1000 weights near 1, moved by 1e-4: the products of which a faster formula is made are 1e9 times as large."""
    x = 1 + normal(4, 1000).float() * 1e-4
    wanted = (x.double()[:, None] - x.double()[None]).square().sum(-1)
    assert ((squared_distances(x, x) - wanted).abs() <= 1e-5 * wanted).all()


def test_a_smooth_function_wants_a_long_scale_and_a_rough_one_a_short_one() -> None:
    x = torch.linspace(0, 3, 31, dtype=torch.float64)[:, None]
    known, new = x[::2], x[1::2]
    d, q = squared_distances(known, known), squared_distances(new, known)
    for frequency, wanted in ((0.5, 10.0), (9.0, 0.3)):
        values = torch.cat([torch.sin(frequency * known), torch.sin(frequency * new)])
        errors = {
            scale: float((predict(known, values[:16], new, scale, 1e-6) - values[16:]).square().sum())
            for scale in (0.01, 0.3, 10.0)
        }
        found = best_length_scale(d, q, values @ values.mT, list(errors), 1e-6)
        assert found == min(errors, key=lambda scale: errors[scale]) == wanted


def test_a_singular_system_is_refused() -> None:
    with pytest.raises(ValueError, match=r"noise=0\.0"):
        regression_weights(torch.ones(3, 3), torch.ones(1, 3), 0.0)
    assert math.isfinite(float(regression_weights(torch.ones(3, 3), torch.ones(1, 3), 1e-3).sum()))
    assert bool(regression_weights(torch.full((2, 2), torch.nan), torch.ones(1, 2), 1e-3).isnan().all())
