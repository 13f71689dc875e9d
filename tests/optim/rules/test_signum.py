"""Signum (signSGD: Compressed Optimisation for Non-Convex Problems, arXiv 1802.04434)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from conformance.problems import Grads, distance, draw, leaves, play, same
from torch import Tensor

from poise.optim import Lion, Signum

signum = partial(Signum, backend="eager")

CASES: list[dict[str, Any]] = [{}, {"momentum": 0.7, "weight_decay": 0.3}]


def reference(
    params: Sequence[Tensor], grads: Grads, *, lr: float | Sequence[float], momentum: float = 0.9, weight_decay: float = 0.0
) -> list[Tensor]:
    """Algorithm 2 of the paper, entry by entry of the list."""
    rates = [lr] * len(grads) if not isinstance(lr, Sequence) else lr
    x = [p.double().clone() for p in params]
    m = [torch.zeros_like(w) for w in x]
    for delta, row in zip(rates, grads, strict=True):
        for i, g in enumerate(row):
            if g is not None:
                m[i] = m[i] * momentum + g.double() * (1 - momentum)
                x[i] = x[i] - delta * (m[i].sign() + weight_decay * x[i])
    return x


@pytest.mark.parametrize("hyper", CASES, ids=["defaults", "others"])
def test_sixty_steps_equal_the_formula(hyper: dict[str, Any]) -> None:
    start, grads = draw([(16, 8), (16,)], 60)
    params = leaves(start)
    assert distance(play(signum(params, lr=0.01, **hyper), params, grads), reference(start, grads, lr=0.01, **hyper)) < 1e-13


def test_it_is_lion_with_one_beta_bit_for_bit() -> None:
    start, grads = draw([(16, 8)], 30)
    a, b = leaves(start), leaves(start)
    found = play(signum(a, lr=0.01, momentum=0.8, weight_decay=0.1), a, grads)
    assert same(found, play(Lion(b, lr=0.01, betas=(0.8, 0.8), weight_decay=0.1, backend="eager"), b, grads))


def test_without_momentum_it_is_sign_descent() -> None:
    start, grads = draw([(16, 8)], 20)
    params = leaves(start)
    wanted = start[0].clone()
    for row in grads:
        (g,) = row
        assert g is not None
        wanted = wanted - 0.01 * g.sign()
    assert distance(play(signum(params, lr=0.01, momentum=0.0), params, grads), [wanted]) < 1e-15


@pytest.mark.parametrize("exponent", [-40, 30])
def test_gradients_times_a_power_of_two_give_the_same_bits(exponent: int) -> None:
    start, grads = draw([(16, 8)], 20)
    scaled: Grads = [[None if g is None else g * 2.0**exponent for g in row] for row in grads]
    a, b = leaves(start), leaves(start)
    assert same(play(signum(a, lr=0.01), a, grads), play(signum(b, lr=0.01), b, scaled))


@pytest.mark.parametrize("name, value", [("lr", -0.1), ("momentum", 1.0), ("weight_decay", -0.1)])
def test_an_impossible_setting_is_refused_by_name(name: str, value: float) -> None:
    hyper: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=name):
        signum(leaves(draw([(4, 4)], 0)[0]), **hyper)
