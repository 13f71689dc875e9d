"""The draws of a study."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from poise.catalog import Space, choice, log_uniform, uniform
from poise.compare.sampler import draw, edge, inside, widen

from .toys import entry


def method(lr: float = 1e-3, momentum: float = 0.9, nesterov: bool = False) -> None:
    """Stands for a method; is never built."""


SPACES = {"lr": log_uniform(1e-4, 1e-1), "momentum": uniform(0.5, 0.99), "nesterov": choice(True, False)}
METHOD = entry(method, "some", **SPACES)


def test_draws_are_the_same_on_every_machine_and_in_every_version() -> None:
    # A change here makes every journal on disk another study.
    assert [draw(METHOD, 0, number) for number in (1, 2)] == [
        {"lr": 0.00378, "momentum": 0.87, "nesterov": True},
        {"lr": 0.00108, "momentum": 0.709, "nesterov": False},
    ]


def test_a_draw_does_not_depend_on_the_draws_before_it() -> None:
    forwards = [draw(METHOD, 5, number) for number in range(10)]
    assert [draw(METHOD, 5, number) for number in reversed(range(10))] == forwards[::-1]


@pytest.mark.parametrize("other", [(METHOD, 6, 3), (replace(METHOD, name="other"), 5, 3), (METHOD, 5, 4)])
def test_seed_method_and_number_each_change_the_draw(other: tuple) -> None:
    assert draw(METHOD, 5, 3)["lr"] != draw(*other)["lr"]


def test_trial_zero_is_the_methods_own_default() -> None:
    assert draw(METHOD, 3, 0) == {"lr": 1e-3, "momentum": 0.9, "nesterov": False}


def test_a_default_outside_the_space_is_not_tried() -> None:
    narrow = replace(METHOD, tune=SPACES | {"lr": log_uniform(1e-2, 1e-1)})
    first = draw(narrow, 3, 0)
    assert 1e-2 <= first.pop("lr") <= 1e-1
    assert first == {"momentum": 0.9, "nesterov": False}


def test_every_draw_lies_inside_its_space() -> None:
    for number in range(200):
        assert all(inside(SPACES[name], value) for name, value in draw(METHOD, 1, number).items())


@pytest.mark.parametrize("seed", range(5))
def test_few_trials_leave_no_large_part_of_the_range_untried(seed: int) -> None:
    lrs = sorted(math.log10(draw(METHOD, seed, number)["lr"]) for number in range(1, 10))
    assert max(b - a for a, b in pairwise([-4.0, *lrs, -1.0])) < 0.3 * 3.0


@pytest.mark.parametrize(
    "space, value, side",
    [
        (log_uniform(1e-4, 1e0), 1.5e-4, "low"),  # 0.04 of the range in the logarithm
        (log_uniform(1e-4, 1e0), 1.7e-4, None),
        (log_uniform(1e-4, 1e0), 0.7, "high"),
        (log_uniform(1e-4, 1e0), 0.5, None),  # half of the range itself, 0.92 of its logarithm
        (uniform(0.0, 1.0), 0.04, "low"),
        (uniform(0.0, 1.0), 0.96, "high"),
        (uniform(0.0, 1.0), 0.5, None),
        (choice("a", "b"), "a", None),
    ],
)
def test_an_edge_is_the_outer_twentieth_of_the_scale_that_is_drawn_on(space: Space, value: float, side: str | None) -> None:
    assert edge(space, value) == side


def test_trials_are_numbered_from_zero() -> None:
    with pytest.raises(ValueError, match="number=-1"):
        draw(METHOD, 0, -1)


RATES = {"lr": log_uniform(1e-4, 1e-1), "weight_decay": log_uniform(1e-3, 1.0), "momentum": uniform(0.0, 1.0)}


def test_a_range_is_widened_beyond_the_edge_that_the_two_best_point_to() -> None:
    best, second = ({"lr": lr, "weight_decay": 0.03, "momentum": 0.99} for lr in (0.09, 0.03))
    wider = widen(RATES, best, second)
    assert wider.keys() == {"lr"}  # a momentum cannot pass 1
    assert wider["lr"].low < 0.03 < 0.1 < wider["lr"].high and wider["lr"].high == pytest.approx(0.1 * 1000**0.5)
    low = widen(RATES, {**best, "lr": 1.1e-4}, {**second, "lr": 3e-4})["lr"]
    assert low.low == pytest.approx(1e-4 / 1000**0.5) and low.high > 1e-4


def test_a_best_value_that_is_alone_at_an_edge_is_taken_for_an_accident() -> None:
    best, second = ({"lr": lr, "weight_decay": 0.03, "momentum": 0.5} for lr in (0.09, 0.001))
    assert widen(RATES, best, second) == {}


def test_less_decay_than_the_least_is_no_decay_and_not_looked_for() -> None:
    best, second = ({"lr": 0.003, "weight_decay": decay, "momentum": 0.5} for decay in (0.001, 0.002))
    assert widen(RATES, best, second) == {}
