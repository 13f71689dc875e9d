"""Momentum: where an average begins, and Lion's with two betas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance.problems import distance, draw, leaves, play
from optim.toys import optimizer

from poise.optim.transforms.momentum import interpolated, momentum


@pytest.mark.parametrize("start", ["zeros", "gradient"])
def test_an_average_begins_at_zero_or_is_the_first_gradient(start: Any) -> None:
    (weight,), grads = draw([(4, 3)], 5)
    params = leaves([weight])
    found = play(optimizer(params, momentum(0.8, average=True, start=start), lr=0.1), params, grads)
    average = torch.zeros_like(weight)
    for t, (g,) in enumerate(grads):
        assert g is not None
        average = g if t == 0 and start == "gradient" else 0.8 * average + 0.2 * g
        weight = weight - 0.1 * average
    assert distance(found, [weight]) < 1e-14


def test_each_parameter_begins_with_its_own_first_gradient() -> None:
    start, grads = draw([(4, 3), (4, 3)], 3, missing=[(0, 1), (1, 1)])
    late, alone = leaves(start), leaves(start[1:])
    rule = momentum(0.8, average=True, start="gradient")
    found = play(optimizer(late, rule, lr=0.1), late, grads)
    assert distance(found[1:], play(optimizer(alone, rule, lr=0.1), alone, [grads[2][1:]])) == 0.0


def test_two_betas_look_ahead_before_they_remember() -> None:
    (weight,), grads = draw([(4, 3)], 5)
    params = leaves([weight])
    found = play(optimizer(params, interpolated((0.7, 0.95)), lr=0.1), params, grads)
    m = torch.zeros_like(weight)
    for (g,) in grads:
        assert g is not None
        weight = weight - 0.1 * (0.7 * m + 0.3 * g)
        m = 0.95 * m + 0.05 * g
    assert distance(found, [weight]) < 1e-14


@pytest.mark.parametrize("options", [{"average": True, "start": "ones"}, {"start": "gradient"}])
def test_a_beginning_that_means_nothing_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="start="):
        momentum(0.9, **options)
