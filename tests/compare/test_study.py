"""The protocol of a comparison, and what it survives."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from poise.catalog import log_uniform
from poise.compare import provenance
from poise.compare.journal import Journal
from poise.compare.study import Nobody, budget, choose, compare

from .toys import ADAM, SETTINGS, SGD, Toy, entry, run, toy_adam, toy_sgd, without_seconds

METHODS = {"sgd": SGD, "adamw": ADAM}


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    """An empty journal."""
    return Journal(tmp_path / "journal.db")


class Count(Nobody):
    """Counts what it is told; may interrupt."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.runs, self.taken, self.dropped, self.stop_at = 0, 0, 0, stop_at

    def begin(self, what: str) -> None:
        self.runs += 1

    def advance(self, passes: int) -> None:
        self.taken += passes
        if self.taken == self.stop_at:
            raise KeyboardInterrupt

    def drop(self, passes: int) -> None:
        self.dropped += passes


def test_a_method_entered_twice_under_two_names_ties_with_itself_exactly(journal: Journal) -> None:
    watch = Count()
    results = compare(Toy(), {"adamw": ADAM, "again": ADAM}, SETTINGS, journal, watch)
    first, second = results.methods
    assert [run.loss for run in first.finals] == [run.loss for run in second.finals]
    assert second.to_reference is not None and (second.to_reference.low, second.to_reference.high) == (0.0, 0.0)
    assert results.verdict.leaders == ["adamw", "again"]
    assert watch.taken == budget({"adamw": ADAM, "again": ADAM}, SETTINGS)  # and both were really run


def test_every_method_gets_the_same_budget(journal: Journal) -> None:
    results = compare(Toy(), METHODS, SETTINGS, journal)
    for found in results.methods:
        assert [(run.number, run.passes) for run in found.trials] == [(number, 6) for number in range(3)]
        assert [(run.number, run.passes) for run in found.finals] == [(number, 8) for number in range(3)]


def test_final_seeds_are_paired_across_methods_and_new_to_the_tuning(journal: Journal) -> None:
    sgd, adam = compare(Toy(), METHODS, SETTINGS, journal).methods
    assert [run.seed for run in sgd.finals] == [run.seed for run in adam.finals]
    assert [run.initial_loss for run in sgd.finals] == [run.initial_loss for run in adam.finals]
    assert not {run.seed for run in sgd.trials} & {run.seed for run in sgd.finals}
    assert len({run.loss for run in sgd.finals}) == 3


def test_the_report_split_is_not_read_before_everything_is_chosen(journal: Journal) -> None:
    task = Toy()
    compare(task, METHODS, SETTINGS, journal)
    splits = [split for split, _ in task.asked if split != "train"]
    assert splits == ["tune"] * 6 + ["report"] * 6


def test_the_choice_is_the_trial_with_the_lowest_loss_that_did_not_diverge() -> None:
    assert choose([run(0, 1.0), run(1, 0.8), run(2, 0.9), run(3, 0.1, diverged=True), run(4, None)]) == 1
    assert choose([run(0, None), run(1, 5.0, diverged=True)]) is None


def test_the_chosen_hyper_parameters_are_those_that_are_run_again(journal: Journal) -> None:
    for found in compare(Toy(), METHODS, SETTINGS, journal).methods:
        assert found.best is not None
        losses = [run.loss for run in found.trials]
        assert losses[found.best] == min(loss for loss in losses if loss is not None)
        assert all(run.hyper == found.trials[found.best].hyper for run in found.finals)


def test_a_best_value_at_the_end_of_its_space_is_flagged(journal: Journal) -> None:
    low = {"sgd": entry(toy_sgd, lr=log_uniform(1e-6, 0.1))}  # the default, 0.1, is the best and the largest
    wide = {"sgd": entry(toy_sgd, lr=log_uniform(1e-6, 10.0))}
    assert compare(Toy(), low, SETTINGS, journal).methods[0].edges == {"lr": "high"}
    assert compare(Toy(), wide, SETTINGS, journal).methods[0].edges == {}


def test_a_method_that_only_diverges_gets_no_final_runs_and_no_place(journal: Journal) -> None:
    watch = Count()
    methods = {"wild": entry(toy_sgd, "wild", lr=log_uniform(1e20, 1e30)), "adamw": ADAM}
    results = compare(Toy(), methods, SETTINGS, journal, watch)
    wild = results.methods[0]
    assert (wild.best, wild.finals, wild.final, wild.divergences) == (None, [], None, 3)
    assert results.verdict.ranking == ["adamw"]
    assert watch.taken + watch.dropped == budget(methods, SETTINGS)


def test_nothing_to_tune_is_tried_once(journal: Journal) -> None:
    plain = {"plain": entry(toy_adam, "plain")}
    assert len(compare(Toy(), plain, SETTINGS, journal).methods[0].trials) == 1
    assert budget(plain, SETTINGS) == 6 + 3 * 8


def test_only_optimizers_are_compared(journal: Journal) -> None:
    from dataclasses import replace

    with pytest.raises(ValueError, match="'int8' is a codec of family memory"):
        compare(Toy(), {"int8": replace(SGD, name="int8", kind="codec", family="memory")}, SETTINGS, journal)


@pytest.mark.parametrize("passes", [1, 7, 19, 50])
def test_an_interrupted_study_goes_on_to_the_same_results(tmp_path: Path, passes: int) -> None:
    whole = compare(Toy(), METHODS, SETTINGS, Journal(tmp_path / "whole.db"))
    first = Count(stop_at=passes)
    with pytest.raises(KeyboardInterrupt):
        compare(Toy(), METHODS, SETTINGS, Journal(tmp_path / "broken.db"), first)
    second = Count()
    resumed = compare(Toy(), METHODS, SETTINGS, Journal(tmp_path / "broken.db"), second)
    assert without_seconds(resumed) == without_seconds(whole)
    total = budget(METHODS, SETTINGS)
    assert second.taken + second.dropped == total
    assert total <= first.taken + second.taken < total + 8  # nothing but the run that was cut is taken twice


def test_a_finished_study_is_not_run_again(tmp_path: Path) -> None:
    first = compare(Toy(), METHODS, SETTINGS, Journal(tmp_path / "journal.db"))
    watch = Count()
    assert compare(Toy(), METHODS, SETTINGS, Journal(tmp_path / "journal.db"), watch) == first
    assert watch.taken == 0


def test_more_trials_go_on_from_those_there_are(journal: Journal) -> None:
    few = compare(Toy(), {"sgd": SGD}, SETTINGS, journal).methods[0].trials
    watch = Count()
    more = compare(Toy(), {"sgd": SGD}, SETTINGS.model_copy(update={"trials": 5}), journal, watch).methods[0].trials
    assert more[:3] == few and len(more) == 5
    assert watch.taken in (2 * 6, 2 * 6 + 3 * 8)  # the finals again only if the choice changed


@pytest.mark.parametrize("change", ["code", "data", "steps", "seed"])
def test_runs_of_other_code_data_or_settings_are_not_taken_for_these(
    journal: Journal, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(Toy(), METHODS, SETTINGS, journal)
    task, settings, watch = Toy(), SETTINGS, Count()
    if change == "code":
        monkeypatch.setattr(provenance, "code", lambda method: "other")
    elif change == "data":
        task.fingerprint = "other"
    else:
        settings = SETTINGS.model_copy(update={change: 5, "tune_steps": 5} if change == "steps" else {change: 5})
    compare(task, METHODS, settings, journal, watch)
    assert watch.taken == budget(METHODS, settings)


def test_the_code_of_a_method_is_its_own_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "someones_rule.py"
    file.write_text("def rule(model, lr=0.1): ...\n")
    import someones_rule  # pyright: ignore[reportMissingImports]

    method = entry(someones_rule.rule)
    before = provenance.code(method)
    assert provenance.code(method) == before
    file.write_text("def rule(model, lr=0.2): ...\n")
    assert provenance.code(method) != before


@pytest.mark.parametrize("content", [b"", b"not a database at all" * 100])
def test_a_file_that_is_no_journal_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "journal.db"
    path.write_bytes(content)
    if content:
        with pytest.raises(ValueError, match=r"journal\.db is not a readable journal"):
            Journal(path)
    else:
        assert Journal(path).rows == []  # SQLite's own empty file


def test_rows_of_something_else_are_not_taken_for_runs(tmp_path: Path) -> None:
    import optuna

    url = f"sqlite:///{tmp_path / 'journal.db'}"
    optuna.create_study(storage=url, study_name="other").optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    with pytest.raises(ValueError, match="--fresh"):
        Journal(tmp_path / "journal.db")


def test_optuna_reads_the_journal(journal: Journal, tmp_path: Path) -> None:
    import optuna

    results = compare(Toy(), METHODS, SETTINGS, journal)
    study = optuna.load_study(study_name="sgd tune", storage=f"sqlite:///{tmp_path / 'journal.db'}")
    assert [trial.params for trial in study.trials] == [run.hyper for run in results.methods[0].trials]
    assert study.best_trial.number == results.methods[0].best


CHILD = """
import sys, time
from pathlib import Path
from compare.test_study import Slow, METHODS
from compare.toys import SETTINGS
from poise.compare import Journal, compare, provenance
provenance.code = lambda method: "pinned"
compare(Slow(), METHODS, SETTINGS, Journal(Path(sys.argv[1])))
"""


class Slow(Toy):
    """Takes its time, so that there is some to kill it in."""

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        time.sleep(0.01)
        return super().loss(model, batch)


def rows(path: Path) -> int:
    """Finished runs on disk, seen from outside."""
    try:
        with sqlite3.connect(path) as database:
            return database.execute("select count(*) from trials where state in ('COMPLETE', 'FAIL')").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


def test_a_killed_study_goes_on_to_the_same_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two processes read the sources at two moments; somebody who saves a file in between must not fail this test.
    monkeypatch.setattr(provenance, "code", lambda method: "pinned")
    path = tmp_path / "journal.db"
    tests = str(Path(__file__).parents[1])
    environment: dict[str, Any] = os.environ | {"PYTHONPATH": os.pathsep.join([tests, *filter(None, sys.path)])}
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(path)], env=environment)
    deadline = time.monotonic() + 120
    while rows(path) < 3:
        assert child.poll() is None and time.monotonic() < deadline, "the study ended, or never began"
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    watch = Count()
    resumed = compare(Slow(), METHODS, SETTINGS, Journal(path), watch)
    whole = compare(Slow(), METHODS, SETTINGS, Journal(tmp_path / "whole.db"))
    assert without_seconds(resumed) == without_seconds(whole)
    assert watch.dropped >= 3 * 6
