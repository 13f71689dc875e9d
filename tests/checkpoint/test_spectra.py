"""Singular values and what is made of them."""

from __future__ import annotations

import math

import pytest
import torch

from poise.checkpoint import spectra
from poise.checkpoint.spectra import spectrum, stacked


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("method", ["svd", "gram"])
@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (50, 50)])
def test_norm_rank_and_condition_are_those_of_linalg(method: str, shape: tuple[int, int]) -> None:
    W = drawn(*shape)
    found, X = spectrum(W, method), W.double()
    assert found is not None and found.method == method
    assert found.spectral == pytest.approx(float(torch.linalg.matrix_norm(X, 2)), rel=1e-10)
    assert found.condition == pytest.approx(float(torch.linalg.cond(X)), rel=1e-6)
    assert found.stable_rank == pytest.approx(float(X.square().sum() / torch.linalg.matrix_norm(X, 2) ** 2), rel=1e-10)
    shares = torch.linalg.svdvals(X) / torch.linalg.svdvals(X).sum()
    assert found.effective_rank == pytest.approx(float(torch.exp(-(shares * shares.log()).sum())), rel=1e-8)
    assert len(found.values) == min(shape)


def test_ranks_of_known_matrices() -> None:
    one, flat = spectrum(torch.outer(drawn(8), drawn(6))), spectrum(torch.eye(10) * 3)
    assert one is not None and flat is not None
    assert one.stable_rank == pytest.approx(1) and one.effective_rank == pytest.approx(1, abs=1e-5)
    assert flat.stable_rank == pytest.approx(10) and flat.effective_rank == pytest.approx(10) and flat.condition == 1


@pytest.mark.parametrize("method", ["svd", "gram"])
def test_a_singular_matrix_has_no_finite_condition(method: str) -> None:
    W = drawn(20, 20)
    W[3] = 0
    found = spectrum(W, method)
    assert found is not None
    assert found.condition == (math.inf if method == "svd" else spectra.DROWNED)


def test_a_convolution_is_a_matrix_of_its_outputs() -> None:
    W = drawn(8, 3, 3, 3)
    assert spectrum(W) == spectrum(W.view(8, 27))


def test_what_is_not_finite_complex_or_empty_has_no_spectrum() -> None:
    bad = drawn(4, 4)
    bad[1, 1] = math.nan
    assert spectrum(bad) is None and stacked(torch.stack([drawn(4, 4), bad])) is None
    assert spectrum(torch.zeros(0, 4)) is None and spectrum(torch.zeros(3, 3, dtype=torch.complex64)) is None


def test_zeros_have_rank_nothing() -> None:
    found = spectrum(torch.zeros(4, 5))
    assert found is not None and found.spectral == 0 and found.condition == math.inf and math.isnan(found.stable_rank)


def test_the_method_is_chosen_by_the_shorter_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectra, "EXACT", 8)
    monkeypatch.setattr(spectra, "GRAM", 16)
    methods = [found.method for size in (8, 16, 40) if (found := spectrum(drawn(size, 64))) is not None]
    assert methods == ["svd", "gram", "lanczos"]
    few = spectrum(drawn(40, 64))
    assert few is not None and len(few.values) == spectra.FEW and few.condition is None and few.effective_rank is None
    true = torch.linalg.matrix_norm(drawn(40, 64).double(), 2)
    assert few.spectral == pytest.approx(float(true), rel=1e-6)
    with pytest.raises(ValueError, match="method='eig'"):
        spectrum(drawn(4, 4), "eig")


def test_of_a_stack_the_worst_conditioned_is_told_with_its_place() -> None:
    stack = torch.stack([torch.eye(5), torch.eye(5) + 0.1 * drawn(5, 5), torch.diag(torch.tensor([1.0, 1, 1, 1, 1e-4]))])
    found = stacked(stack)
    assert found is not None and found.place == 2 and found.condition == pytest.approx(1e4)
