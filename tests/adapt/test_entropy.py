"""The entropy that test-time adaptation lowers."""

from __future__ import annotations

import math

import pytest
import torch

from poise.adapt.entropy import confident_entropy, entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entropy_is_that_of_the_distribution(dtype: torch.dtype) -> None:
    p = torch.tensor([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]], dtype=dtype)
    wanted = torch.tensor([1.5 * math.log(2), math.log(3)], dtype=dtype)
    torch.testing.assert_close(entropy(p.log() + 5), wanted)


def test_classes_that_are_ruled_out_count_for_nothing() -> None:
    logits = torch.tensor([1.0, 2.0, -math.inf], requires_grad=True)
    found = entropy(logits)
    torch.testing.assert_close(found, entropy(torch.tensor([1.0, 2.0])))
    found.backward()
    assert logits.grad is not None and bool(logits.grad.isfinite().all()) and float(logits.grad[2]) == 0


def test_the_mean_is_over_the_samples_below_the_limit() -> None:
    logits = torch.tensor([[4.0, 0.0, 0.0], [0.0, 0.0, 0.0], [3.0, 0.0, 0.0], [1.0, 0.0, 0.0]]).double().requires_grad_()
    found, kept = confident_entropy(logits, 0.4)
    assert kept.tolist() == [True, False, True, False]
    torch.testing.assert_close(found, entropy(logits)[[0, 2]].mean())
    found.backward()
    assert logits.grad is not None and not logits.grad[[1, 3]].any() and bool(logits.grad[[0, 2]].all())


@pytest.mark.parametrize("shape", [(5, 3), (0, 3), (2, 4, 3)])
def test_where_no_sample_is_below_it_the_term_is_zero_and_so_is_its_gradient(shape: tuple[int, ...]) -> None:
    logits = torch.zeros(shape, requires_grad=True)
    found, kept = confident_entropy(logits)
    assert float(found.detach()) == 0 and not kept.any()
    found.backward()
    assert logits.grad is not None and not logits.grad.any()
