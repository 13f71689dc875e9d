"""AdamW (Decoupled Weight Decay Regularization, arXiv 1711.05101), in torch's convention."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import pytest
import torch
from conformance.problems import Grads, distance, draw, leaves, play
from torch import Tensor

from poise.optim import SGD, AdamW

# Mathematics needs no compiler; that compiled mathematics is the same is shown for all rules at once in tests/conformance.
sgd = partial(SGD, backend="eager")
adamw = partial(AdamW, backend="eager")

CASES: list[dict[str, Any]] = [
    {},
    {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.0},
    {"weight_decay": 0.1, "decay": "independent"},
    {"weight_decay": 0.1, "decay": "after"},
]


def reference(
    params: Sequence[Tensor],
    grads: Grads,
    *,
    lr: float | Sequence[float],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    decay: str = "coupled",
) -> list[Tensor]:
    """The paper's Algorithm 2; decay is lr * weight_decay ("coupled"), or schedule * weight_decay ("independent")."""
    rates = list(lr) if isinstance(lr, Sequence) else [lr] * len(grads)
    b1, b2 = betas
    ends = []
    for i, start in enumerate(params):  # parameters do not see each other: one after another
        theta = start.double().clone()
        m, v, t = torch.zeros_like(theta), torch.zeros_like(theta), 0
        for rate, row in zip(rates, grads, strict=True):
            gradient = row[i]
            if gradient is None:
                continue
            g = gradient.double()
            t += 1
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * g**2
            step = rate * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
            if decay == "coupled":
                theta = theta - step - rate * weight_decay * theta
            elif decay == "independent":
                theta = theta - step - rate / rates[0] * weight_decay * theta
            elif decay == "after":
                theta = (1 - rate * weight_decay) * (theta - step)
            else:
                raise ValueError(decay)
        ends.append(theta)
    return ends


@pytest.mark.parametrize("hyper", [{}, {"betas": (0.8, 0.9), "eps": 1e-4, "weight_decay": 0.3}], ids=["defaults", "others"])
def test_two_hundred_steps_equal_torch_adamw(hyper: dict[str, Any]) -> None:
    start, grads = draw([(16, 8), (16,), ()], 200)
    ours, theirs = leaves(start), leaves(start)
    found = play(adamw(ours, lr=1e-3, **hyper), ours, grads)
    wanted = play(torch.optim.AdamW(theirs, lr=1e-3, **hyper), theirs, grads)
    assert distance(found, wanted) < 1e-12
    assert distance(reference(start, grads, lr=1e-3, **hyper), wanted) < 1e-12


def test_defaults_are_torchs() -> None:
    start, grads = draw([(16, 8)], 20)
    ours, theirs = leaves(start), leaves(start)
    assert distance(play(adamw(ours), ours, grads), play(torch.optim.AdamW(theirs), theirs, grads)) < 1e-13


def test_float32_weights_follow_torchs_float32_adamw() -> None:
    start, grads = draw([(64, 128), (64,)], 30, dtype=torch.float32)
    ours, theirs = leaves(start), leaves(start)
    found = play(AdamW(ours, lr=1e-2), ours, grads)
    assert distance(found, play(torch.optim.AdamW(theirs, lr=1e-2), theirs, grads)) < 1e-5


def test_zero_gradients_only_decay_the_weights() -> None:
    start, grads = draw([(16, 8)], 40)
    params = leaves(start)
    factors = [1.0 - 0.02 * t for t in range(40)]
    zeros: Grads = [[torch.zeros_like(g) for g in row if g is not None] for row in grads]
    found = play(adamw(params, lr=0.1, weight_decay=0.5), params, zeros, factors)
    assert distance(found, [start[0] * prod(1 - 0.1 * factor * 0.5 for factor in factors)]) < 1e-14


def test_independent_decay_is_the_papers_and_not_scaled_by_the_learning_rate() -> None:
    start, _ = draw([(16, 8)], 0)
    zeros: Grads = [[torch.zeros(16, 8, dtype=torch.float64)] for _ in range(3)]
    for lr in (0.1, 1e-4):
        params = leaves(start)
        found = play(adamw(params, lr=lr, weight_decay=0.01, decay="independent"), params, zeros, [1.0, 0.5, 0.25])
        assert distance(found, [start[0] * (1 - 0.01) * (1 - 0.005) * (1 - 0.0025)]) < 1e-14


def test_decay_after_the_step_shrinks_the_step_too() -> None:
    start, grads = draw([(16, 8)], 1)
    ends = {}
    for decay in ("coupled", "after"):
        params = leaves(start)
        ends[decay] = play(adamw(params, lr=0.1, weight_decay=0.5, decay=decay), params, grads)[0]
    signs = -torch.sign(grads[0][0]) if grads[0][0] is not None else torch.empty(0)
    assert distance([ends["after"] - ends["coupled"]], [-0.1 * 0.5 * 0.1 * signs]) < 1e-8


def test_l2_regularisation_is_not_decoupled_decay_under_adam() -> None:
    start, grads = draw([(16, 8)], 5)
    decoupled, plain = leaves(start), leaves(start)
    found = play(adamw(decoupled, lr=1e-2, weight_decay=0.5), decoupled, grads)
    opt = adamw(plain, lr=1e-2, weight_decay=0.0)
    for row in grads:  # the decay goes through the gradient statistics
        assert row[0] is not None
        play(opt, plain, [[row[0] + 0.5 * plain[0].detach()]])
    assert distance(found, plain) > 1e-3


def test_l2_regularisation_is_decoupled_decay_under_sgd() -> None:
    """The other half of the paper's claim, on the very data of the test above."""
    start, grads = draw([(16, 8)], 5)
    decoupled, l2 = leaves(start), leaves(start)
    found = play(sgd(decoupled, lr=1e-2, weight_decay=0.5, decay="coupled"), decoupled, grads)
    assert distance(found, play(sgd(l2, lr=1e-2, weight_decay=0.5, decay="l2"), l2, grads)) < 1e-15


def test_the_first_step_is_the_sign_of_the_gradient_times_lr() -> None:
    """Bias correction makes it so; without it the step would be 0.1 / sqrt(0.001) = 3.16 times as long."""
    start, grads = draw([(16, 8)], 1)
    params = leaves(start)
    found = play(adamw(params, lr=0.01, eps=0.0, weight_decay=0.0), params, grads)
    assert grads[0][0] is not None
    assert distance(found, [start[0] - 0.01 * torch.sign(grads[0][0])]) < 1e-14


def test_bias_correction_counts_the_steps_of_each_parameter() -> None:
    start, grads = draw([(16, 8), (16,)], 6, missing=[(0, 1), (1, 1), (3, 0)])
    params = leaves(start)
    found = play(adamw(params, lr=0.01), params, grads)
    assert distance(found, reference(start, grads, lr=0.01)) < 1e-13


@pytest.mark.parametrize(
    "name, value",
    [("lr", -1e-3), ("betas", (1.0, 0.999)), ("betas", (0.9, -0.1)), ("eps", -1e-8), ("weight_decay", -0.1), ("decay", "l3")],
)
def test_an_impossible_setting_is_refused_by_name(name: str, value: Any) -> None:
    hyper: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=name):
        adamw(leaves(draw([(4, 4)], 0)[0]), **hyper)
