"""How far from orthogonal (Beyond the Ideal: Analyzing the Inexact Muon Update, arXiv 2510.19933)."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from conformance.cases import mutated
from torch import Tensor

from poise import catalog
from poise.linalg import polar
from poise.linalg.newton_schulz import NewtonSchulz
from poise.linalg.orthogonality import orthogonalization_error
from poise.linalg.polar import orthogonalize


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def delta(m: Tensor, method: str, **options: Any) -> float:
    return float(orthogonalization_error(m, method, **options).spectral)


# The convergent quintic step (15/8, -10/8, 3/8), alone.
@pytest.fixture
def classical(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(polar.METHODS, "classical", NewtonSchulz(((15 / 8, -10 / 8, 3 / 8),), steps=10))
    return "classical"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_delta_falls_with_the_steps_of_convergent_methods(classical: str, seed: int) -> None:
    m = gaussian(128, 128, seed=seed)
    for method, steps in (("qdwh", (2, 3, 4, 6)), ("polar_express", (3, 4, 5, 7, 10, 16)), (classical, (4, 8, 12, 16, 20, 24))):
        errors = [delta(m, method, steps=n) for n in steps]
        assert all(later < earlier or later < 1e-12 for earlier, later in itertools.pairwise(errors)), method
        assert errors[0] > 0.3, method
        assert errors[-1] < 1e-4, method


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_delta_of_ns5_has_a_floor_of_0318_that_five_steps_do_not_reach(seed: int) -> None:
    m = gaussian(128, 128, seed=seed)
    errors = {n: delta(m, "ns5", steps=n) for n in (5, 10, 12, 16, 20)}
    assert 0.4 < errors[5] < 1.0
    for n in (10, 12, 16, 20):
        assert abs(errors[n] - 0.318) < 2e-3


@pytest.mark.parametrize("shape", [(128, 128), (3, 40, 16), (16, 40)])
def test_delta_of_the_exact_method_is_zero(shape: tuple[int, ...]) -> None:
    error = orthogonalization_error(gaussian(*shape), "svd")
    assert float(error.spectral.max()) < 1e-12
    assert float((error.sigma_max - error.sigma_min).max()) < 1e-12


def test_lower_precision_is_a_larger_delta() -> None:
    m = gaussian(64, 64, dtype=torch.float32)
    errors = [delta(m, "polar_express", steps=8, dtype=dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)]
    assert errors[0] < errors[1] < errors[2]


def test_a_method_by_name_is_its_result_with_its_options() -> None:
    m = gaussian(24, 16, dtype=torch.float32)
    cases: list[dict[str, Any]] = [{}, {"steps": 3}, {"form": "gram"}, {"dtype": torch.bfloat16}]
    for options in cases:
        by_name = orthogonalization_error(m, "dyn5", **options)
        by_result = orthogonalization_error(m, orthogonalize(m, "dyn5", **options))
        assert by_name == by_result


def test_its_tests_tell_it_from_its_mutant() -> None:
    wrong = mutated(catalog.get("orthogonalization-error"))
    m = torch.diag(torch.tensor([3.0, 2.0]))
    assert abs(float(wrong(m, torch.diag(torch.tensor([1.1, 0.8]))).spectral) - 0.2) > 0.01


def test_the_catalog_knows_it_as_a_diagnostic_with_a_path_that_imports() -> None:
    found = catalog.get("orthogonalization-error")
    assert found in catalog.methods("linalg")
    assert found.kind == "diagnostic"
    module, _, name = found.import_path.rpartition(".")
    assert getattr(__import__(module, fromlist=[name]), name) is orthogonalization_error


def test_the_error_of_a_known_result() -> None:
    m = torch.diag(torch.tensor([3.0, 2.0]))
    error = orthogonalization_error(m, torch.diag(torch.tensor([1.1, 0.8])))
    assert float(error.spectral) == pytest.approx(0.2)
    assert float(error.frobenius) == pytest.approx(math.sqrt(0.05 / 2))
    assert float(error.sigma_min) == pytest.approx(0.8)
    assert float(error.sigma_max) == pytest.approx(1.1)


@pytest.mark.parametrize("shape", [(2, 3, 8, 12), (2, 3, 12, 8), (8, 12)])
def test_the_error_has_one_value_for_each_matrix_and_is_zero_for_exact_ones(shape: tuple[int, ...]) -> None:
    m = gaussian(*shape, dtype=torch.float32).requires_grad_()
    error = orthogonalization_error(m, orthogonalize(m.double(), "svd"))
    for value, wanted in ((error.spectral, 0.0), (error.frobenius, 0.0), (error.sigma_min, 1.0), (error.sigma_max, 1.0)):
        assert value.shape == shape[:-2]
        assert not value.requires_grad
        assert (value - wanted).abs().max() < 1e-12


def test_the_error_of_zero_is_zero() -> None:
    error = orthogonalization_error(torch.zeros(3, 4), torch.zeros(3, 4))
    assert float(error.spectral) == float(error.frobenius) == 0.0


def test_the_error_needs_two_equal_shapes_with_entries() -> None:
    with pytest.raises(ValueError, match="must be equal"):
        orthogonalization_error(torch.ones(2, 3), torch.ones(3, 2))
    with pytest.raises(ValueError, match="entries"):
        orthogonalization_error(torch.ones(0, 3), torch.ones(0, 3))


def test_options_without_a_method_are_refused() -> None:
    with pytest.raises(ValueError, match="steps=3"):
        orthogonalization_error(torch.eye(3), torch.eye(3), steps=3)
    with pytest.raises(ValueError, match="ns6"):
        orthogonalization_error(torch.eye(3), "ns6")
