"""How sure a comparison is."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from poise.compare.results import Run
from poise.compare.statistics import gap, interval, paired, verdict

from .toys import run

A = [1.00, 1.10, 0.95, 1.20, 1.02]
B = [1.05, 1.12, 1.01, 1.21, 1.08]


def test_paired_differences_have_scipys_interval() -> None:
    found = paired(A, B)
    known = stats.ttest_rel(A, B).confidence_interval(0.95)
    assert found is not None and (found.low, found.high) == pytest.approx((known.low, known.high), rel=1e-12)


def test_the_interval_of_three_known_values() -> None:
    # t_2 at 97.5 % is 4.302653; mean 2, s = 1: half width 4.302653 / sqrt(3).
    found = interval([1.0, 2.0, 3.0])
    assert found is not None and (found.mean, found.low, found.high) == pytest.approx((2.0, -0.484138, 4.484138), abs=1e-6)


def test_pairing_sees_a_difference_that_separate_intervals_would_hide() -> None:
    ours, theirs = interval(A), interval(B)
    assert ours is not None and theirs is not None and ours.high is not None and theirs.low is not None
    assert ours.high > theirs.low
    assert verdict({"a": A, "b": B}).leaders == ["a"]


def test_equal_losses_are_a_tie_with_no_difference_at_all() -> None:
    found = paired(A, list(A))
    assert found is not None and (found.mean, found.low, found.high) == (0.0, 0.0, 0.0)
    assert verdict({"adamw": A, "again": list(A)}).leaders == ["adamw", "again"]


def test_a_lower_mean_within_the_noise_is_a_tie() -> None:
    found = verdict({"a": [1.0, 1.2, 0.9], "b": [1.1, 1.1, 1.1]})
    assert found.ranking == ["a", "b"] and found.leaders == ["a", "b"]
    assert "a and b tie" in found.sentence


def test_a_winner_beats_every_other_method_and_not_only_the_next() -> None:
    noisy = [1.9, 0.7, 1.3, 1.0, 1.1]  # third by mean, but too noisy to be told from the best
    found = verdict({"a": A, "b": B, "noisy": noisy})
    assert found.ranking == ["a", "b", "noisy"] and found.leaders == ["a", "noisy"]


def test_the_winners_sentence_names_the_gap_and_its_interval() -> None:
    sentence = verdict({"b": B, "a": A}).sentence
    assert sentence.startswith("a wins at 1.05: 0.040 below b (95% interval ") and "5 paired seeds" in sentence


def test_one_seed_is_always_a_tie() -> None:
    found = verdict({"a": [1.0], "b": [9.0]})
    assert found.leaders == ["a", "b"] and "one seed" in found.sentence


def test_who_diverged_on_a_seed_is_out_of_the_ranking() -> None:
    found = verdict({"a": A, "wild": [0.1, 0.1, None, 0.1, 0.1]})
    assert found.ranking == ["a"] and found.leaders == ["a"] and "diverged" in found.sentence


def test_there_is_no_verdict_when_all_diverged() -> None:
    found = verdict({"a": [None, 1.0], "b": [None, None]})
    assert found.leaders == [] and found.sentence.startswith("no verdict")


def test_unpaired_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        paired([1.0, 2.0], [1.0])


def trial(number: int, loss: float | None) -> Run:
    return run(number, loss)


def test_the_gap_is_from_the_best_trial_to_the_second_best() -> None:
    assert gap([trial(0, 1.5), trial(1, 1.1), trial(2, 1.25), trial(3, None)]) == pytest.approx(0.15)
    assert gap([trial(0, 1.5)]) is None and gap([trial(0, 1.5), trial(1, None)]) is None


def test_a_gap_estimates_how_far_the_best_of_a_few_draws_is_from_the_optimum() -> None:
    """Two hyper-parameters drawn around a quadratic optimum: the gap and what is left have the same mean."""
    rng = np.random.default_rng(0)
    losses = np.sort(rng.uniform(-1, 1, (4000, 12, 2)).__pow__(2).sum(-1), axis=1)
    gaps = [gap([trial(i, float(loss)) for i, loss in enumerate(row)]) for row in losses]
    assert np.mean([found for found in gaps if found is not None]) == pytest.approx(losses[:, 0].mean(), rel=0.1)


def test_a_difference_that_luck_in_tuning_may_explain_is_a_tie() -> None:
    assert verdict({"a": A, "b": B}, {"a": 0.001, "b": None}).leaders == ["a"]
    found = verdict({"a": A, "b": B}, {"a": None, "b": 0.05})
    assert found.leaders == ["a", "b"] and "other draws in tuning" in found.sentence
    assert verdict({"a": A, "b": B}, {"a": 0.025, "b": 0.025}).leaders == ["a", "b"]  # 0.029, 0.025, 0.025: by squares 0.046
