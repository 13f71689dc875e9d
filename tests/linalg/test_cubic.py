"""The minimum of a cubically regularized quadratic: its conditions, which are also sufficient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from poise.linalg.cubic import cubic_step


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotated(values: Tensor, seed: int = 0) -> Tensor:
    Q = torch.linalg.qr(normal(len(values), len(values), seed=seed)).Q
    return Q @ torch.diag(values) @ Q.mT


def check(H: Tensor, g: Tensor, M: float, tolerance: float = 1e-10) -> Tensor:
    """`(H + M r / 2 I) h = -g` and `H + M r / 2 I >= 0` with r = ||h||: no other h is as low."""
    values, vectors = torch.linalg.eigh(H)
    h = cubic_step(values, vectors, g, M)
    r = torch.linalg.vector_norm(h)
    shifted = H + M * r / 2 * torch.eye(len(g), dtype=H.dtype)
    size = g.norm() + torch.linalg.matrix_norm(H, 2) * r + M * r**2
    assert (shifted @ h + g).norm() <= tolerance * size
    assert torch.linalg.eigvalsh(shifted)[0] >= -tolerance * (torch.linalg.matrix_norm(H, 2) + M * r)
    return h


SPECTRA = {
    "convex": [0.5, 1.0, 3.0, 10.0],
    "singular": [0.0, 0.0, 1.0, 4.0],
    "indefinite": [-2.0, -0.5, 0.0, 3.0],
    "concave": [-3.0, -3.0, -2.0, -1.0],
    "zero": [0.0, 0.0, 0.0, 0.0],
    "wide": [-1e-3, 1e-6, 1.0, 1e5],
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("M", [1e-4, 1.0, 1e6])
@pytest.mark.parametrize("size", [1e-8, 1.0, 1e6])
def test_it_is_the_global_minimum(spectrum: str, M: float, size: float) -> None:
    check(rotated(torch.tensor(SPECTRA[spectrum], dtype=torch.float64)), size * normal(4, seed=1), M)


@pytest.mark.parametrize("spectrum", ["indefinite", "concave", "wide"])
@pytest.mark.parametrize("part", [1e-3, 1e-9, 1e-15, 0.0])
def test_the_hard_case_and_what_comes_near_it(spectrum: str, part: float) -> None:
    """Small gradients with next to nothing along the lowest eigenvector: h has its length from there."""
    values = torch.tensor(SPECTRA[spectrum], dtype=torch.float64)
    g = torch.tensor([part, 0.0, 1e-3, 2e-3], dtype=torch.float64) * values.abs().max()
    h = check(torch.diag(values), g, 2.0)
    if part <= 1e-9:
        assert float(h.norm()) >= -float(values[0]) * (1 - 1e-12)


def test_at_a_saddle_without_gradient_it_goes_2_lambda_over_M_along_the_lowest_direction() -> None:
    h = check(torch.diag(torch.tensor([-2.0, 1.0, 5.0], dtype=torch.float64)), torch.zeros(3, dtype=torch.float64), 8.0)
    assert torch.allclose(h.abs(), torch.tensor([0.5, 0.0, 0.0], dtype=torch.float64))


def test_where_the_quadratic_has_its_minimum_at_once_it_stays() -> None:
    assert torch.equal(cubic_step(torch.ones(2), torch.eye(2), torch.zeros(2), 1.0), torch.zeros(2))


def test_a_line_goes_down_by_the_root_of_its_slope() -> None:
    """H = 0: r = sqrt(2 ||g|| / M)."""
    h = cubic_step(torch.zeros(2), torch.eye(2), torch.tensor([3.0, 4.0]), 10.0)
    assert torch.allclose(h, -torch.tensor([0.6, 0.8])) and h.dtype == torch.float32


def test_a_small_M_is_newtons_step_and_a_large_one_a_short_step() -> None:
    H, g = rotated(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)), normal(3, seed=2)
    assert torch.allclose(check(H, g, 1e-12), -torch.linalg.solve(H, g))
    assert float(check(H, g, 1e12).norm()) == pytest.approx(math.sqrt(2e-12 * float(g.norm())), rel=1e-4)


def test_M_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"M=0\.0"):
        cubic_step(torch.ones(2), torch.eye(2), torch.ones(2), 0.0)
