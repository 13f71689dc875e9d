"""Weight conditioning (Weight Conditioning for Smooth Optimization of Neural Networks, arXiv 2409.03424)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conformance.cases import mutated
from torch import Tensor, nn

from poise.catalog import get
from poise.training import WeightConditioning, WeightNorm, fold, reparameterize

F64 = torch.float64


def reference(W: Tensor, sides: str = "row", iterations: int = 1) -> Tensor:
    """Row by row, then column by column."""
    W = W.clone()
    for _ in range(iterations):
        if "row" in sides:
            for i in range(W.shape[0]):
                W[i] /= math.sqrt(sum(float(x) ** 2 for x in W[i]))
        if "column" in sides:
            for j in range(W.shape[1]):
                W[:, j] /= math.sqrt(sum(float(x) ** 2 for x in W[:, j]))
    return W


def draw(rows: int, columns: int, seed: int = 0, spread: float = 0.0) -> Tensor:
    """Gaussian, rows scaled by 10^-spread to 10^spread."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, dtype=F64, generator=generator)
    return W * torch.logspace(-spread, spread, rows, dtype=F64)[torch.randperm(rows, generator=generator)].unsqueeze(1)


def layer(W: Tensor, kind: Any = WeightConditioning, **options: Any) -> Any:
    linear = nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=F64)
    with torch.no_grad():
        linear.weight.copy_(W)
    return reparameterize(linear, kind, **options)


def gap(kind: Any) -> float:
    cases = [{}, {"sides": "column"}, {"sides": "row_column"}, {"sides": "row_column", "iterations": 3}]
    W = draw(6, 4, spread=1.0)
    return max(float((layer(W, kind, **case).weight - reference(W, **case)).abs().max()) for case in cases)


def condition(W: Tensor) -> float:
    s = torch.linalg.svdvals(W)
    return float(s[0] / s[-1])


def test_it_equals_its_reference_on_every_side() -> None:
    assert gap(WeightConditioning) < 1e-14


def test_the_reference_tells_it_from_its_mutant() -> None:
    assert gap(mutated(get("weight-conditioning"))) > 1e-3


def test_every_row_has_length_1_that_of_a_convolution_over_inputs_and_kernel() -> None:
    assert torch.allclose(layer(draw(40, 30, spread=2.0)).weight.norm(dim=1), torch.ones(40, dtype=F64), rtol=1e-14)
    convolution: Any = reparameterize(nn.Conv2d(3, 5, 3).double(), WeightConditioning)
    assert torch.allclose(convolution.weight.flatten(1).norm(dim=1), torch.ones(5, dtype=F64), rtol=1e-14)
    transposed: Any = reparameterize(nn.ConvTranspose2d(3, 5, 3).double(), WeightConditioning)
    assert torch.allclose(transposed.weight.square().sum((0, 2, 3)), torch.ones(5, dtype=F64), rtol=1e-14)


def test_orthogonal_rows_of_any_lengths_come_out_perfectly_conditioned() -> None:
    Q = torch.linalg.qr(draw(30, 20)).Q.T  # 20 orthonormal rows
    W = Q * torch.logspace(-3, 3, 20, dtype=F64).unsqueeze(1)
    assert condition(W) > 1e5
    assert abs(condition(layer(W).weight.detach()) - 1) < 1e-12


def test_van_der_sluis_no_diagonal_matrix_is_better_by_more_than_the_root_of_the_rows() -> None:
    for seed in range(5):
        W = draw(40, 30, seed, spread=2.0)
        before, after = condition(W), condition(layer(W).weight.detach())
        assert after < before / 50
        generator = torch.Generator().manual_seed(seed)
        # rows as they were drawn, the equilibrated ones, and others near both: none may beat the bound
        for spread in (0.0, 0.1, 0.3, 1.0):
            for _ in range(20):
                D = (spread * torch.randn(40, 1, dtype=F64, generator=generator)).exp()
                assert after <= math.sqrt(40) * condition(D * reference(W))


def test_a_badly_scaled_matrix_comes_out_well_conditioned() -> None:
    """40 x 30 with rows scaled by 1e-2 to 1e2: from thousands to about ten."""
    before = [condition(draw(40, 30, seed, spread=2.0)) for seed in range(10)]
    after = [condition(layer(draw(40, 30, seed, spread=2.0)).weight.detach()) for seed in range(10)]
    assert sorted(before)[5] > 1000
    assert sorted(after)[5] < 20


def test_outputs_do_not_feel_the_lengths_of_rows() -> None:
    W = draw(6, 4)
    x = torch.randn(5, 4, dtype=F64)
    lengths = torch.rand(6, 1, dtype=F64).add_(0.1)
    assert torch.allclose(layer(W)(x), layer(lengths * W)(x), rtol=1e-13)
    assert not torch.allclose(layer(W)(x), layer(-lengths * W)(x))


def test_the_gradient_of_a_row_is_orthogonal_to_it_unless_the_preconditioner_is_detached() -> None:
    W, G = draw(6, 4, spread=1.0), draw(6, 4, seed=1)
    through, detached = layer(W), layer(W, detach_preconditioner=True)
    assert torch.equal(through.weight, detached.weight)
    for one in (through, detached):
        (one.weight * G).sum().backward()
    a, b = (one.parametrizations.weight.original.grad for one in (through, detached))
    assert float((a * W).sum(1).abs().max()) < 1e-12
    assert torch.allclose(b, G / W.norm(dim=1, keepdim=True), rtol=1e-13)  # P as a constant
    assert float((b * W).sum(1).abs().min()) > 1e-3
    across = b - W * (b * W).sum(1, keepdim=True) / W.square().sum(1, keepdim=True)
    assert torch.allclose(a, across, atol=1e-12)  # the part of the same gradient that stands across the row


def test_it_equals_weight_normalization_whose_g_stays_1() -> None:
    W, x, target = draw(6, 4, spread=1.0), torch.randn(9, 4, dtype=F64), torch.randn(9, 6, dtype=F64)
    conditioned, normalized = layer(W), layer(W, WeightNorm)
    held = normalized.parametrizations.weight
    held.original0.requires_grad_(False).fill_(1.0)
    steps = [torch.optim.SGD([p], lr=0.3) for p in (conditioned.parametrizations.weight.original, held.original1)]
    for _ in range(10):
        for one, opt in zip((conditioned, normalized), steps, strict=True):
            opt.zero_grad()
            (one(x) - target).square().mean().backward()
            opt.step()
    assert torch.allclose(conditioned.parametrizations.weight.original, held.original1, rtol=1e-12)
    assert not torch.allclose(held.original1, W)
    assert torch.allclose(conditioned(x), normalized(x), rtol=1e-12)


def test_columns_are_what_comes_last_and_alternation_tends_to_both() -> None:
    W = draw(6, 4, spread=1.0)
    assert torch.allclose(layer(W, sides="column").weight.norm(dim=0), torch.ones(4, dtype=F64))
    once, often = (layer(W, sides="row_column", iterations=n).weight for n in (1, 40))
    for found in (once, often):
        assert torch.allclose(found.norm(dim=0), torch.ones(4, dtype=F64))
    rows = math.sqrt(4 / 6)
    assert float((often.norm(dim=1) - rows).abs().max()) < 1e-6 < float((once.norm(dim=1) - rows).abs().max())


def test_folding_writes_the_conditioned_weight_into_a_plain_layer() -> None:
    W = draw(6, 4, spread=1.0)
    plain = fold(layer(W))
    assert type(plain) is nn.Linear
    assert torch.allclose(plain.weight, reference(W), rtol=1e-14)


def test_unknown_settings_and_zero_columns_are_refused() -> None:
    W = draw(6, 4)
    with pytest.raises(ValueError, match="sides='rows': must be one of row, column, row_column"):
        layer(W, sides="rows")
    for bad in ({"iterations": 0}, {"iterations": 2}, {"iterations": 2, "sides": "column"}):
        with pytest.raises(ValueError, match="iterations="):
            layer(W, **bad)
    W[:, 2] = 0
    layer(W)
    for sides in ("column", "row_column"):
        with pytest.raises(ValueError, match="'weight': column 2 of 4 is zero"):
            layer(W, sides=sides)
