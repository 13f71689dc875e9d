"""Lion (Symbolic Discovery of Optimization Algorithms, arXiv 2302.06675)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from conformance.problems import Grads, distance, draw, leaves, play, same
from torch import Tensor

from poise.optim import Lion

# Mathematics needs no compiler; that compiled mathematics is the same is shown for all rules at once in tests/conformance.
lion = partial(Lion, backend="eager")

CASES: list[dict[str, Any]] = [{}, {"betas": (0.95, 0.98), "weight_decay": 0.3}]


def reference(
    params: Sequence[Tensor],
    grads: Grads,
    *,
    lr: float | Sequence[float],
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
) -> list[Tensor]:
    """Decay, the sign of one average, and only then the other average takes the gradient in."""
    rates = list(lr) if isinstance(lr, Sequence) else [lr] * len(grads)
    weights = [p.double().clone() for p in params]
    averages = [torch.zeros_like(w) for w in weights]
    for rate, row in zip(rates, grads, strict=True):
        for i, gradient in enumerate(row):
            if gradient is None:
                continue
            g, m = gradient.double(), averages[i]
            weights[i] = weights[i] * (1 - rate * weight_decay)
            weights[i] = weights[i] - rate * torch.sign(betas[0] * m + (1 - betas[0]) * g)
            averages[i] = betas[1] * m + (1 - betas[1]) * g
    return weights


@pytest.mark.parametrize("hyper", CASES, ids=["defaults", "others"])
def test_sixty_steps_equal_the_formula(hyper: dict[str, Any]) -> None:
    start, grads = draw([(16, 8), (16,)], 60)
    params = leaves(start)
    assert distance(play(lion(params, lr=0.01, **hyper), params, grads), reference(start, grads, lr=0.01, **hyper)) < 1e-13


def test_the_order_of_the_betas_matters() -> None:
    """Otherwise the comparison with the formula could not tell swapped betas, nor an average updated too early."""
    start, grads = draw([(16, 8)], 60)
    right = reference(start, grads, lr=0.01)
    assert distance(right, reference(start, grads, lr=0.01, betas=(0.99, 0.9))) > 1e-2
    params = leaves(start)
    assert distance(play(lion(params, lr=0.01, betas=(0.99, 0.9)), params, grads), right) > 1e-2


@pytest.mark.parametrize("exponent", [-12, 1, 20])
def test_gradients_times_a_power_of_two_give_the_same_bits(exponent: int) -> None:
    start, grads = draw([(64, 128), (64,)], 12, dtype=torch.float32)
    scaled: Grads = [[g * 2.0**exponent for g in row if g is not None] for row in grads]
    ends = []
    for rows in (grads, scaled):
        params = leaves(start)
        ends.append(play(Lion(params, lr=1e-3, weight_decay=0.1), params, rows))
    assert same(*ends)


def test_without_memory_it_is_sign_descent_with_decoupled_decay() -> None:
    start, grads = draw([(16, 8)], 20)
    params = leaves(start)
    found = play(lion(params, lr=0.01, betas=(0.0, 0.0), weight_decay=0.2), params, grads)
    theta = start[0]
    for row in grads:
        assert row[0] is not None
        theta = theta * (1 - 0.01 * 0.2) - 0.01 * torch.sign(row[0])
    assert distance(found, [theta]) < 1e-14


def test_every_entry_moves_by_lr_or_not_at_all() -> None:
    _, grads = draw([(16, 8)], 8)
    for row in grads:
        assert row[0] is not None
        row[0][:, :2] = 0.0  # these never get a gradient, and the sign of zero is zero
    params = leaves([torch.zeros(16, 8, dtype=torch.float64)])
    opt = lion(params, lr=0.3, weight_decay=0.7)
    for row in grads:
        with torch.no_grad():
            params[0].zero_()  # nothing to decay, and what is found afterwards is the update itself
        moved = play(opt, params, [row])[0]
        assert torch.equal(moved[:, :2], torch.zeros(16, 2, dtype=torch.float64))
        assert torch.equal(moved[:, 2:].abs(), torch.full((16, 6), 0.3, dtype=torch.float64))


def test_zero_gradients_only_decay_the_weights() -> None:
    start, _ = draw([(16, 8)], 0)
    params = leaves(start)
    zeros: Grads = [[torch.zeros(16, 8, dtype=torch.float64)] for _ in range(10)]
    found = play(lion(params, lr=0.1, weight_decay=0.5), params, zeros)
    assert distance(found, [start[0] * (1 - 0.1 * 0.5) ** 10]) < 1e-14


@pytest.mark.parametrize("name, value", [("lr", -1e-3), ("betas", (1.0, 0.99)), ("betas", (0.9, -0.1)), ("weight_decay", -0.1)])
def test_an_impossible_setting_is_refused_by_name(name: str, value: Any) -> None:
    hyper: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=name):
        lion(leaves(draw([(4, 4)], 0)[0]), **hyper)
