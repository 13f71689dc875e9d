"""Mean-only batch normalization (Weight Normalization, arXiv 1602.07868, section 4)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance.cases import mutated
from torch import Tensor

from poise.catalog import get
from poise.training import MeanOnlyBatchNorm

F64 = torch.float64


def reference(t: Tensor, b: Tensor) -> Tensor:
    """Feature by feature, of (batch, features, positions)."""
    y = torch.zeros_like(t)
    for f in range(t.shape[1]):
        y[:, f] = t[:, f] - sum(float(x) for x in t[:, f].flatten()) / t[:, f].numel() + b[f]
    return y


def gradient(kind: Any) -> Tensor:
    norm = kind(4).double()
    t = torch.randn(6, 4, 5, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = torch.randn(6, 4, 5, dtype=F64, generator=torch.Generator().manual_seed(1))
    (norm(t) * weights).sum().backward()
    assert t.grad is not None
    return t.grad - (weights - weights.mean((0, 2), keepdim=True))


def test_the_mean_of_the_batch_is_subtracted_and_the_bias_added() -> None:
    norm = MeanOnlyBatchNorm(4).double()
    with torch.no_grad():
        norm.bias.copy_(torch.arange(4))  # pyright: ignore[reportOptionalMemberAccess]
    t = 3 + torch.randn(6, 4, 5, dtype=F64)
    assert torch.allclose(norm(t), reference(t, torch.arange(4)), atol=1e-13)


def test_the_gradient_flows_through_the_mean_and_is_centred() -> None:
    assert float(gradient(MeanOnlyBatchNorm).abs().max()) < 1e-14


def test_the_gradient_tells_it_from_its_mutant() -> None:
    assert float(gradient(mutated(get("mean-only-batch-norm"))).abs().max()) > 1e-3


def test_in_evaluation_the_running_mean_stands_in() -> None:
    norm = MeanOnlyBatchNorm(3, momentum=0.25, bias=False).double()
    mean = torch.zeros(3, dtype=F64)
    for _ in range(4):
        t = 5 + torch.randn(8, 3, dtype=F64)
        norm(t)
        mean = 0.75 * mean + 0.25 * t.mean(0)
    norm.eval()
    t = torch.randn(2, 3, dtype=F64)
    assert torch.allclose(norm(t), t - mean, atol=1e-13)
    assert torch.equal(norm(t)[:1], norm(t[:1]))  # a sample no longer depends on its batch


def test_it_does_not_look_at_the_variance() -> None:
    norm = MeanOnlyBatchNorm(3).double()
    t = torch.randn(8, 3, 2, 2, dtype=F64)
    assert torch.allclose(norm(7 * t), 7 * norm(t), atol=1e-13)


def test_features_may_stand_last() -> None:
    t = torch.randn(4, 6, 3, dtype=F64)
    assert torch.equal(MeanOnlyBatchNorm(3, dim=-1).double()(t), MeanOnlyBatchNorm(3).double()(t.mT).mT)


def test_bfloat16_means_are_taken_in_float32() -> None:
    t = (torch.randn(4096, 2) + 100).bfloat16()
    found = MeanOnlyBatchNorm(2).bfloat16()(t)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, (t.float() - t.float().mean(0)).bfloat16())


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="momentum=0"):
        MeanOnlyBatchNorm(3, momentum=0.0)
    with pytest.raises(ValueError, match="4 features in dimension 1, not 3"):
        MeanOnlyBatchNorm(3)(torch.ones(2, 4))
