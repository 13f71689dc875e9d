"""How much of the reference's budget reaches the same loss."""

from __future__ import annotations

import math

import pytest

from poise.compare.speedup import crossing, speedup

CURVE = [(50, 4.0), (100, 3.0), (200, 2.0)]


@pytest.mark.parametrize(
    "loss, passes, bound",
    [
        (3.0, 100.0, "exact"),
        (2.5, 100.0 * math.sqrt(2), "exact"),  # half way between two budgets, in the logarithm
        (3.75, 50.0 * 2**0.25, "exact"),
        (2.0, 200.0, "exact"),
        (1.9, 200.0, "at least"),
        (4.1, 50.0, "at most"),
    ],
)
def test_the_budget_of_equal_loss_lies_between_finished_runs(loss: float, passes: float, bound: str) -> None:
    assert crossing(CURVE, loss, 100) == (pytest.approx(passes), bound)


@pytest.mark.parametrize("curve", [[(50, 2.9), (100, 3.0), (200, 3.1)], [(50, 3.0), (100, 3.0), (200, 3.0)]])
def test_equal_losses_are_a_speed_up_of_one_on_a_curve_that_rises_or_lies_flat(curve: list[tuple[int, float]]) -> None:
    assert crossing(curve, 3.0, 100) == (100.0, "exact")


@pytest.mark.parametrize("loss", [2.99, 2.5, 3.01, 3.5])
def test_a_lower_loss_is_a_gain_and_a_higher_one_none_on_a_curve_that_rises_by_chance(loss: float) -> None:
    rising = [(25, 4.0), (50, 2.9), (100, 3.0), (200, 3.05), (400, 2.4)]
    assert (crossing(rising, loss, 100)[0] > 100) == (loss < 3.0)


def test_seeds_are_drawn_in_pairs_so_what_they_share_cancels() -> None:
    luck = [0.0, 0.7, -0.4, 0.2, -0.5]  # of each seed, the same for all runs
    curve = [(at, [loss + shift for shift in luck]) for at, loss in CURVE]
    found = speedup([2.5 + shift for shift in luck], 100, curve)
    assert found is not None
    assert (found.ratio, found.low, found.high) == pytest.approx((math.sqrt(2),) * 3)


def test_the_interval_covers_the_noise_that_seeds_do_not_share() -> None:
    found = speedup([2.3, 2.7, 2.4, 2.6, 2.5], 100, [(at, [loss] * 5) for at, loss in CURVE])
    assert found is not None
    assert found.low < found.ratio == pytest.approx(math.sqrt(2)) and found.ratio < found.high
    assert (found.low, found.high) == pytest.approx((2**0.37, 2**0.63), abs=0.02)  # means of five, within about 0.12


def test_where_the_optimum_is_known_what_is_left_to_it_is_what_falls() -> None:
    curve = [(100, [1.0 + 1e-2]), (200, [1.0 + 1e-4])]
    found = speedup([1.0 + 1e-3], 100, curve, optimum=1.0)
    assert found is not None and found.ratio == pytest.approx(math.sqrt(2))
    straight = speedup([1.0 + 1e-3], 100, curve)
    assert straight is not None and straight.ratio > 1.8


def test_one_budget_says_nothing() -> None:
    assert speedup([1.0], 100, [(100, [1.0])]) is None
    assert speedup([1.0], 100, [(50, [1.0]), (200, [1.0])]) is None
