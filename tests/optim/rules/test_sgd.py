"""SGD as torch documents it, and SGDW (Decoupled Weight Decay Regularization, arXiv 1711.05101)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from conformance.problems import Grads, distance, draw, leaves, play
from torch import Tensor

from poise.optim import SGD

# Mathematics needs no compiler; that compiled mathematics is the same is shown for all rules at once in tests/conformance.
sgd = partial(SGD, backend="eager")

CASES: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1, "decay": "coupled"},
    {"momentum": 0.9, "weight_decay": 0.1, "decay": "independent"},
    {"momentum": 0.9, "weight_decay": 0.1, "decay": "after"},
]
TYPICAL: dict[str, Any] = {"momentum": 0.9}  # without momentum it has no state to keep


def reference(
    params: Sequence[Tensor],
    grads: Grads,
    *,
    lr: float | Sequence[float],
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    decay: str = "l2",
) -> list[Tensor]:
    """The buffer starts as the first gradient, undamped, and never contains the learning rate."""
    rates = list(lr) if isinstance(lr, Sequence) else [lr] * len(grads)
    weights = [p.double().clone() for p in params]
    buffers: list[Tensor | None] = [None] * len(weights)
    for rate, row in zip(rates, grads, strict=True):
        for i, gradient in enumerate(row):
            if gradient is None:
                continue
            theta, g = weights[i], gradient.double()
            if decay == "l2":
                g = g + weight_decay * theta
            direction = g
            if momentum != 0:
                before = buffers[i]
                after = g if before is None else momentum * before + (1 - dampening) * g
                buffers[i] = after
                direction = g + momentum * after if nesterov else after
            step = rate * direction
            if decay == "l2":
                weights[i] = theta - step
            elif decay == "coupled":
                weights[i] = theta - step - rate * weight_decay * theta
            elif decay == "independent":
                weights[i] = theta - step - rate / rates[0] * weight_decay * theta
            elif decay == "after":
                weights[i] = (1 - rate * weight_decay) * (theta - step)
            else:
                raise ValueError(decay)
    return weights


@pytest.mark.parametrize("momentum, dampening, nesterov", [(0, 0, False), (0.9, 0, False), (0.9, 0.4, False), (0.9, 0, True)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_two_hundred_steps_equal_torch_sgd(momentum: float, dampening: float, nesterov: bool, weight_decay: float) -> None:
    start, grads = draw([(16, 8), (16,)], 200)
    hyper: dict[str, Any] = dict(momentum=momentum, dampening=dampening, nesterov=nesterov, weight_decay=weight_decay)
    ours, theirs = leaves(start), leaves(start)
    found = play(sgd(ours, lr=0.01, **hyper), ours, grads)
    wanted = play(torch.optim.SGD(theirs, lr=0.01, **hyper), theirs, grads)
    assert distance(found, wanted) < 1e-12
    assert distance(reference(start, grads, lr=0.01, **hyper), wanted) < 1e-12


def test_l2_and_decoupled_decay_are_the_same_thing_without_momentum() -> None:
    start, grads = draw([(16, 8)], 50)
    ends = []
    for decay in ("l2", "coupled"):
        params = leaves(start)
        ends.append(play(sgd(params, lr=0.05, weight_decay=0.2, decay=decay), params, grads))
    assert distance(*ends) < 1e-14


def test_l2_and_decoupled_decay_differ_with_momentum() -> None:
    start, grads = draw([(16, 8)], 20)
    ends = []
    for decay in ("l2", "coupled"):
        params = leaves(start)
        ends.append(play(sgd(params, lr=0.05, momentum=0.9, weight_decay=0.2, decay=decay), params, grads))
    assert distance(*ends) > 1e-3


def test_zero_gradients_only_decay_the_weights() -> None:
    start, grads = draw([(16, 8)], 30)
    params = leaves(start)
    factors = [1.0 - 0.03 * t for t in range(30)]
    zeros: Grads = [[torch.zeros_like(g) for g in row if g is not None] for row in grads]
    found = play(sgd(params, lr=0.1, momentum=0.9, weight_decay=0.5, decay="coupled"), params, zeros, factors)
    kept = 1.0
    for factor in factors:
        kept *= 1 - 0.1 * factor * 0.5
    assert distance(found, [kept * start[0]]) < 1e-14


def test_independent_decay_follows_the_schedule_and_not_the_learning_rate() -> None:
    start, grads = draw([(16, 8)], 3)
    zeros: Grads = [[torch.zeros_like(g) for g in row if g is not None] for row in grads]
    for lr in (0.1, 1e-4):
        params = leaves(start)
        opt = sgd(params, lr=lr, weight_decay=0.01, decay="independent")
        found = play(opt, params, zeros, [1.0, 0.5, 0.25])
        assert distance(found, [start[0] * (1 - 0.01) * (1 - 0.005) * (1 - 0.0025)]) < 1e-14


def test_the_buffer_holds_gradients_and_not_steps() -> None:
    """With the learning rate inside the buffer, as the paper writes it, weights would go on moving at lr 0."""
    start, grads = draw([(16, 8)], 4)
    params = leaves(start)
    opt = sgd(params, lr=0.1, momentum=0.9)
    moved = play(opt, params, grads[:2])
    stood = play(opt, params, grads[2:3], [0.0])
    assert distance(stood, moved) == 0.0
    opt.param_groups[0]["lr"] = 0.1
    found = play(opt, params, grads[3:])
    assert distance(found, reference(start, grads, lr=[0.1, 0.1, 0.0, 0.1], momentum=0.9)) < 1e-14


def test_dampening_spares_the_first_gradient() -> None:
    start, grads = draw([(16, 8)], 1)
    params = leaves(start)
    found = play(sgd(params, lr=1.0, momentum=0.9, dampening=0.5), params, grads)
    assert grads[0][0] is not None
    assert distance(found, [start[0] - grads[0][0]]) < 1e-15


@pytest.mark.parametrize("hyper", [{"momentum": 0.0}, {"momentum": 0.9, "dampening": 0.1}])
def test_nesterov_without_momentum_or_with_dampening_is_refused(hyper: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"(?i)nesterov"):
        sgd(leaves(draw([(4, 4)], 0)[0]), lr=0.1, nesterov=True, **hyper)


@pytest.mark.parametrize("name, value", [("lr", -0.1), ("momentum", -0.5), ("weight_decay", -1.0), ("decay", "l3")])
def test_an_impossible_setting_is_refused_by_name(name: str, value: Any) -> None:
    hyper: dict[str, Any] = {"lr": 0.1, name: value}
    with pytest.raises(ValueError, match=name):
        sgd(leaves(draw([(4, 4)], 0)[0]), **hyper)
