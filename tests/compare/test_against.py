"""Two comparisons side by side."""

from __future__ import annotations

import os

import pytest
from rich.console import Console
from scipy import stats

from poise.compare.against import Row, changes, sentence, set_beside, table, unshared, welch
from poise.compare.results import Interval, Results

from .report_cases import ADAMW, LION, MUON, full, later, made, method


def study(losses: list[float | None], **settings: int) -> Results:
    """One entry, `lion`."""
    found = made([method("lion", losses, losses, losses)])
    return found.model_copy(update={"settings": found.settings.model_copy(update=settings)})


def test_where_both_ran_the_same_seeds_the_difference_is_taken_seed_by_seed() -> None:
    (row,) = set_beside(study([*LION]), study([*ADAMW]))
    known = stats.ttest_rel(LION, ADAMW).confidence_interval(0.95)
    assert row.paired and row.difference is not None
    assert (row.difference.low, row.difference.high) == pytest.approx((known.low, known.high), rel=1e-12)
    assert row.difference.mean < 0 and sentence(row) == "better here"


@pytest.mark.parametrize("other", [study([*ADAMW], seed=1), study([*ADAMW[:4]])], ids=["another seed", "fewer seeds"])
def test_otherwise_the_difference_is_welchs(other: Results) -> None:
    (row,) = set_beside(study([*LION]), other)
    theirs = [run.loss for run in other.methods[0].finals]
    known = stats.ttest_ind(LION, theirs, equal_var=False).confidence_interval(0.95)
    assert not row.paired and row.difference is not None
    assert (row.difference.low, row.difference.high) == pytest.approx((known.low, known.high), rel=1e-9)


def test_welch_without_two_of_each_has_no_bounds_and_with_one_missing_is_not_there() -> None:
    assert welch([1.0], [2.0, 3.0]) == Interval(mean=-1.5, low=None, high=None)
    assert welch([1.0, None], [2.0, 3.0]) is None
    assert welch([1.0, 1.0], [2.0, 2.0]) == Interval(mean=-1.0, low=-1.0, high=-1.0)
    assert welch([], [1.0]) is None


@pytest.mark.parametrize("what", ["task", "fingerprint"])
def test_other_tasks_and_other_data_are_refused_and_both_are_named(what: str) -> None:
    mine = full()
    theirs = mine.model_copy(update={what: "another"})
    with pytest.raises(ValueError, match=f"{what} is '{getattr(mine, what)}' here and 'another' there"):
        set_beside(mine, theirs)


def test_only_what_both_have_is_compared_and_the_rest_is_named() -> None:
    assert [row.name for row in set_beside(full(), later())] == ["adamw", "lion"]
    assert unshared(full(), later()) == (["muon", "wild"], ["newton"])


def test_what_was_set_or_ran_differently_is_listed() -> None:
    mine, theirs = full(), later()
    theirs = theirs.model_copy(update={"settings": theirs.settings.model_copy(update={"steps": 600})})
    assert changes(mine, theirs) == [("steps", 300, 600), ("torch", "2.13.0", "2.14.0")]
    assert changes(mine, full()) == []


@pytest.mark.parametrize(
    "ours, theirs, words",
    [
        (LION, LION, "no difference shown"),
        (MUON, LION, "better here"),
        (LION, MUON, "better there"),
        ([2.0, None, 2.0, 2.0, 2.0], LION, "diverged here"),
        (LION, [None] * 5, "diverged there"),
    ],
)
def test_the_outcome_is_said_in_words(ours: list[float | None], theirs: list[float | None], words: str) -> None:
    (row,) = set_beside(study(ours), study(theirs))
    assert sentence(row) == words
    assert (row.difference is None) == ("diverged" in words)


def test_a_row_is_plain_in_json() -> None:
    value = Interval(mean=1.0, low=0.5, high=1.5)
    assert Row("lion", value, None, None, True).as_dict() == {
        "name": "lion",
        "ours": {"mean": 1.0, "low": 0.5, "high": 1.5},
        "theirs": None,
        "difference": None,
        "paired": True,
    }


def test_the_terminal_shows_both_what_differs_and_what_only_one_has() -> None:
    console = Console(width=140, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table(full(), later()))
    lines = console.export_text().splitlines()
    (lion,) = [line for line in lines if "│ lion" in line]
    cells = [cell.strip() for cell in lion.strip("│ ").split("│")]
    assert cells == ["lion", "2.2366 ± 0.0094", "2.2866 ± 0.0094", "-0.05 ± 0", "seed by seed", "better here"]
    assert [line.strip() for line in lines[-3:]] == [
        "torch: 2.13.0 here, 2.14.0 there",
        "only here: muon, wild",
        "only there: newton",
    ]
