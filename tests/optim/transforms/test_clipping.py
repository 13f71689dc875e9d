"""Clipping by the global norm (On the difficulty of training Recurrent Neural Networks, arXiv 1211.5063)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from conformance.problems import Grads, distance, draw, leaves, play, same
from torch import Tensor

from poise.optim import Optimizer, chain
from poise.optim.transforms.clipping import clip
from poise.optim.transforms.momentum import momentum

# Mathematics needs no compiler; that compiled mathematics is the same is shown for all at once in tests/conformance.
optimizer = partial(Optimizer, backend="eager")

CASES: list[dict[str, Any]] = [{"max_norm": 1.0}, {"max_norm": 0.3, "weight_decay": 0.1}, {"max_norm": 1e6}]


def build(params: Any, *, max_norm: float = 1.0, lr: Any = 0.01, **options: Any) -> Optimizer:
    """Clipped heavy-ball descent: the shortest optimizer that keeps state behind a clip."""
    return Optimizer(params, chain(clip(max_norm), momentum(0.9)), lr=lr, **options)


def reference(
    params: Sequence[Tensor],
    grads: Grads,
    *,
    lr: float | Sequence[float],
    max_norm: float = 1.0,
    weight_decay: float = 0.0,
) -> list[Tensor]:
    """One factor for all gradients that are there; then `buf <- 0.9 buf + g` and a step."""
    rates = list(lr) if isinstance(lr, Sequence) else [lr] * len(grads)
    weights = [p.double().clone() for p in params]
    buffers = [torch.zeros_like(w) for w in weights]
    for rate, row in zip(rates, grads, strict=True):
        norm = sum(float(g.double().pow(2).sum()) for g in row if g is not None) ** 0.5
        factor = min(1.0, max_norm / (norm + 1e-6))
        for i, g in enumerate(row):
            if g is not None:
                buffers[i] = 0.9 * buffers[i] + factor * g.double()
                weights[i] = weights[i] - rate * buffers[i] - rate * weight_decay * weights[i]
    return weights


def clipped(grads: Sequence[Tensor | None], max_norm: float, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The gradients as they leave the clip: what a step at lr 1 subtracts from weights that are zero."""
    params = leaves([torch.zeros(4) if g is None else torch.zeros_like(g) for g in grads], dtype)
    opt = optimizer(params, chain(clip(max_norm)), lr=1.0)
    return [-p for p in play(opt, params, [list(grads)])]


def norm(tensors: Sequence[Tensor]) -> float:
    return float(sum(t.detach().double().pow(2).sum() for t in tensors)) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_within_the_bound_pass_bit_for_bit(dtype: torch.dtype) -> None:
    _, ((*grads,),) = draw([(64, 128), (64,)], 1, dtype=dtype)
    gradients = [g for g in grads if g is not None]
    assert same(clipped(gradients, norm(gradients) * 1.001, dtype), gradients)


def test_longer_gradients_are_scaled_to_the_bound() -> None:
    gradients = [torch.tensor([3.0], dtype=torch.float64), torch.tensor([4.0], dtype=torch.float64)]
    found = clipped(gradients, 1.0)
    assert norm(found) == pytest.approx(5.0 / (5.0 + 1e-6), rel=1e-14)  # 0.9999998
    assert distance(found, [torch.tensor([0.6], dtype=torch.float64), torch.tensor([0.8], dtype=torch.float64)]) < 2e-7


def test_one_norm_runs_over_all_tensors_and_keeps_their_proportions() -> None:
    _, ((*grads,),) = draw([(64, 128), (64,), ()], 1)
    gradients = [g for g in grads if g is not None]
    factor = 1.0 / (norm(gradients) + 1e-6)
    assert distance(clipped(gradients, 1.0), [g * factor for g in gradients]) < 1e-14


def test_it_clips_as_torch_does() -> None:
    start, grads = draw(steps=5)
    ours, theirs = leaves(start), leaves(start)
    found = play(optimizer(ours, chain(clip(1.0)), lr=0.1), ours, grads)
    opt = torch.optim.SGD(theirs, lr=0.1)
    for row in grads:
        for p, g in zip(theirs, row, strict=True):
            p.grad = None if g is None else g.clone()
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        opt.step()
    assert distance(found, theirs) < 1e-13


def test_one_clip_in_two_groups_sees_both() -> None:
    gradients = [torch.tensor([3.0], dtype=torch.float64), torch.tensor([4.0], dtype=torch.float64)]
    params = leaves([torch.zeros_like(g) for g in gradients])
    opt = optimizer([{"params": params[:1]}, {"params": params[1:], "lr": 0.5}], chain(clip(1.0)), lr=1.0)
    found = play(opt, params, [list(gradients)])
    assert distance(found, [torch.tensor([-0.6], dtype=torch.float64), torch.tensor([-0.4], dtype=torch.float64)]) < 2e-7


def test_a_parameter_without_gradient_is_not_counted_and_not_moved() -> None:
    gradients = [torch.tensor([3.0], dtype=torch.float64), None, torch.tensor([4.0], dtype=torch.float64)]
    found = clipped(gradients, 1.0)
    assert norm([found[0], found[2]]) == pytest.approx(5.0 / (5.0 + 1e-6), rel=1e-14)
    assert torch.equal(found[1].abs(), torch.zeros(4, dtype=torch.float64))


def test_decoupled_decay_is_not_clipped() -> None:
    start, grads = draw([(16, 8)], 1)
    params = leaves(start)
    opt = optimizer(params, chain(clip(1e-9)), lr=0.1, weight_decay=0.5)
    assert distance(play(opt, params, grads), [start[0] * 0.95]) < 1e-9


@pytest.mark.parametrize("size", [1e20, 1e30, 3e38])
def test_huge_float32_gradients_are_clipped_and_not_zeroed(size: float) -> None:
    """Their squares overflow: a norm of inf would turn every gradient into 0."""
    gradients = [torch.full((64, 128), size), torch.full((64,), -size)]
    found = clipped(gradients, 1.0, torch.float32)
    assert norm(found) == pytest.approx(1.0, rel=1e-4)
    assert found[0].min() > 0 and found[1].max() < 0


def test_tiny_float32_gradients_below_the_bound_pass_bit_for_bit() -> None:
    """Their squares underflow to a norm of 0."""
    gradients = [torch.full((64, 128), 1e-30), torch.full((64,), -1e-30)]
    assert same(clipped(gradients, 1.0, torch.float32), gradients)


def test_bfloat16_gradients_are_summed_in_float32_or_better() -> None:
    """torch's own function says 3.172 for a norm of 3.165, because it returns it in bfloat16."""
    gradients = [torch.full((64, 128), 0.035, dtype=torch.bfloat16)]
    true = norm(gradients)
    stock = float(torch.nn.utils.get_total_norm(gradients))
    assert abs(stock / true - 1) > 1e-3  # else the next line would prove nothing
    # rounding the 8192 results to bfloat16 stochastically leaves their mean where it was, to 2^-8 / sqrt(8192)
    found = clipped(gradients, 1.0, torch.bfloat16)[0].double().mean() * 8192**0.5
    assert float(found) == pytest.approx(1.0, rel=3e-4)


@pytest.mark.parametrize("poison", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_that_is_not_finite_abandons_the_whole_step_and_is_counted(poison: float, dtype: torch.dtype) -> None:
    start, grads = draw([(64, 128), (64,)], 4, dtype=dtype)
    params, twin = leaves(start), leaves(start)
    opt = optimizer(params, chain(clip(1.0), momentum(0.9)), lr=0.1, weight_decay=0.1)
    clean = optimizer(twin, chain(clip(1.0), momentum(0.9)), lr=0.1, weight_decay=0.1)
    before = play(opt, params, grads[:2])
    bad = [g.clone() for g in grads[2] if g is not None]
    bad[1][7] = poison
    assert same(play(opt, params, [list(bad)]), before)
    assert opt.state[params[0]]["skipped"] == 1
    # the state did not see it either: both go on alike
    if dtype is torch.float32:
        assert same(play(opt, params, grads[3:]), play(clean, twin, [*grads[:2], grads[3]]))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_bound_that_is_not_positive_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="max_norm"):
        clip(value)


@pytest.mark.parametrize("hyper", CASES, ids=["clipped", "clipped and decayed", "not clipped"])
def test_the_composed_optimizer_equals_the_formula(hyper: dict[str, Any]) -> None:
    start, grads = draw(steps=8, missing=[(2, 0), (5, 3)])
    params = leaves(start)
    found = play(build(params, lr=0.05, backend="eager", **hyper), params, grads)
    assert distance(found, reference(start, grads, lr=0.05, **hyper)) < 1e-13
