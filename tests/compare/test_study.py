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
import torch
from torch import Tensor, nn

from poise.catalog import choice, log_uniform, uniform
from poise.compare import provenance
from poise.compare.entries import Entry, parse
from poise.compare.journal import Journal
from poise.compare.plan import budget, check, choose
from poise.compare.results import Settings
from poise.compare.study import Nobody, compare

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


def paired_betas(model: nn.Module, lr: float = 0.05, betas: tuple[float, float] = (0.9, 0.999)) -> torch.optim.Optimizer:
    """Adam that wants its betas as a pair, as a rule may."""
    assert isinstance(betas, tuple)
    return torch.optim.Adam(model.parameters(), lr=lr, betas=betas)


@pytest.mark.parametrize("passes", [1, 7, 30])
def test_pairs_are_still_pairs_when_a_study_goes_on(tmp_path: Path, passes: int) -> None:
    """The journal is JSON, which has no tuples."""
    methods = {"adam": entry(paired_betas, lr=log_uniform(1e-2, 1e-1), betas=choice((0.9, 0.95), (0.9, 0.999)))}
    whole = compare(Toy(), methods, SETTINGS, Journal(tmp_path / "whole.db"))
    with pytest.raises(KeyboardInterrupt):
        compare(Toy(), methods, SETTINGS, Journal(tmp_path / "broken.db"), Count(stop_at=passes))
    resumed = compare(Toy(), methods, SETTINGS, Journal(tmp_path / "broken.db"))
    assert without_seconds(resumed) == without_seconds(whole)


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
    again = compare(Toy(), METHODS, SETTINGS, Journal(tmp_path / "journal.db"), watch)
    assert without_seconds(again) == without_seconds(first)
    assert [found.finals for found in again.methods] == [found.finals for found in first.methods]  # seconds too
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
compare(Slow(), METHODS, SETTINGS, Journal(Path(sys.argv[1])), timing=False)
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


# -- spaces that turn out too narrow -------------------------------------------------------------------------------------

EIGHT = SETTINGS.model_copy(update={"trials": 8})
NARROW = entry(toy_sgd, "narrow", lr=log_uniform(1e-5, 1e-3))  # a hundred times below the best


def test_trials_in_a_wider_space_are_among_those_that_every_method_gets(journal: Journal) -> None:
    narrow, wide = compare(Toy(), {"narrow": NARROW, "sgd": SGD}, EIGHT, journal).methods
    assert [run.number for run in narrow.trials] == [run.number for run in wide.trials] == list(range(8))
    assert {run.passes for run in narrow.trials} == {6}
    low, high = narrow.widened["lr"]["low"], narrow.widened["lr"]["high"]
    assert low < 1e-3 < high and all(low <= run.hyper["lr"] <= high for run in narrow.trials[6:])
    assert any(run.hyper["lr"] > 1e-3 for run in narrow.trials[6:])
    assert wide.widened == {} and all(run.hyper["lr"] <= 0.5 for run in wide.trials)


def test_an_edge_is_judged_by_the_widened_space(journal: Journal) -> None:
    (found,) = compare(Toy(), {"narrow": NARROW}, EIGHT, journal).methods
    assert found.best is not None and found.best >= 6  # the wider space held something better
    top = found.widened["lr"]["high"]
    assert found.edges == ({"lr": "high"} if found.trials[found.best].hyper["lr"] > 0.8 * top else {})


def test_the_other_hyper_parameters_stay_at_their_best_while_an_edge_is_looked_beyond(journal: Journal) -> None:
    method = entry(toy_sgd, "narrow", lr=log_uniform(1e-5, 1e-3), momentum=uniform(0.0, 0.9))
    (found,) = compare(Toy(), {"narrow": method}, EIGHT, journal).methods
    first = choose(found.trials[:6])
    assert first is not None
    assert {run.hyper["momentum"] for run in found.trials[6:]} == {found.trials[first].hyper["momentum"]}


# -- the reference at other budgets --------------------------------------------------------------------------------------

BUDGETS = SETTINGS.model_copy(update={"budgets": (0.5, 2.0)})


def test_the_reference_is_finished_at_every_budget(journal: Journal) -> None:
    watch = Count()
    results = compare(Toy(), METHODS, BUDGETS, journal, watch)
    assert results.reference == "adamw"
    assert [point.passes for point in results.budgets] == [4, 8, 16]
    for point in results.budgets:
        assert [(run.passes, run.seed) for run in point.runs] == [(point.passes, 1 + seed) for seed in range(3)]
    assert watch.taken == budget(METHODS, BUDGETS) == budget(METHODS, SETTINGS) + (4 + 16) * (2 + 3)
    assert results.budgets[1].runs == results.methods[1].finals


def test_a_method_that_is_the_reference_has_a_speed_up_of_one(journal: Journal) -> None:
    results = compare(Toy(), {"adamw": ADAM, "again": ADAM}, BUDGETS, journal)
    for found in results.methods:
        assert found.speedup is not None
        assert (found.speedup.ratio, found.speedup.low, found.speedup.high, found.speedup.bound) == (1.0, 1.0, 1.0, "exact")


def test_an_untuned_reference_makes_a_speed_up_that_tuning_takes_away(journal: Journal) -> None:
    settings = Settings.model_validate(dict(trials=6, tune_steps=60, steps=60, seeds=4, budgets=(0.25, 0.5, 2.0, 4.0)))
    untuned = {"adamw": Entry(ADAM, {"lr": 0.03}), "rival": entry(toy_adam, "rival", lr=log_uniform(1e-3, 0.5))}
    tuned = untuned | {"adamw": ADAM}
    fake = compare(Toy(), untuned, settings, journal).methods[1].speedup
    real = compare(Toy(), tuned, settings, journal).methods[1].speedup
    assert fake is not None and real is not None
    assert fake.ratio > 1.5 and 0.5 < real.ratio < 1.5


def test_the_ranking_in_the_middle_of_the_runs_is_kept_beside_the_last(journal: Journal) -> None:
    results = compare(Toy(), METHODS, SETTINGS, journal)
    assert sorted(results.verdict.halfway) == sorted(results.verdict.ranking) == ["adamw", "sgd"]


def test_alone_a_method_needs_no_further_budgets(journal: Journal) -> None:
    assert budget({"adamw": ADAM}, BUDGETS) == budget({"adamw": ADAM}, SETTINGS)
    assert compare(Toy(), {"adamw": ADAM}, BUDGETS, journal).budgets == []


@pytest.mark.parametrize("tune", [{"lr": log_uniform(1e20, 1e30)}, {}])
def test_what_was_planned_is_taken_or_dropped_whatever_happens(journal: Journal, tune: dict[str, Any]) -> None:
    methods = {"adamw": entry(toy_sgd if tune else toy_adam, "adamw", **tune), "sgd": SGD}
    watch = Count()
    compare(Toy(), methods, BUDGETS, journal, watch)
    assert watch.taken + watch.dropped == budget(methods, BUDGETS)


# -- fixed settings and seconds ------------------------------------------------------------------------------------------


def test_what_is_fixed_is_not_tuned_and_reaches_every_run(journal: Journal) -> None:
    fixed = {"sgd": SGD, "fixed": Entry(SGD, {"lr": 0.01, "momentum": 0.5})}
    tuned, found = compare(Toy(), fixed, SETTINGS, journal).methods
    assert found.fixed == {"lr": 0.01, "momentum": 0.5} and found.space == {} and len(found.trials) == 1
    assert tuned.final is not None and found.final is not None and found.final.mean > tuned.final.mean


def test_what_cannot_be_built_is_said_before_anything_is_run() -> None:
    with pytest.raises(ValueError, match=r"'odd' cannot be built with \{'colour': 'red'\}"):
        check({"odd": Entry(SGD, {"colour": "red"})}, Toy())


@pytest.mark.parametrize(
    ("methods", "meant"),
    [
        ("lion(lrr=0.001)", "'lr' by 'lrr'"),
        ("lion(lr=0.001,weight=0)", "'weights' by 'weight'"),
        ("lora(rnk=4)", "'rank' by 'rnk'"),
    ],
)
def test_what_may_have_been_meant_is_said(methods: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"; did you mean {meant}\?"):
        check(parse(methods), Toy())


def test_nothing_is_guessed_where_the_name_is_right_or_like_no_other() -> None:
    for one in (Entry(SGD, {"lr": -1.0}), Entry(SGD, {"colour": "red"}), parse("adamw(lr=-1.0)")["adamw"]):
        with pytest.raises(ValueError, match="cannot be built with") as error:
            check({"odd": one}, Toy())
        assert "did you mean" not in str(error.value)


def test_seconds_are_measured_in_turns_after_all_runs(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Told(Toy):
        def model(self) -> nn.Module:
            order.append("model")
            return super().model()

    monkeypatch.setattr("poise.compare.timing.block", lambda loop: order.append("block") or (0.25, 0.125))
    sgd, adam = compare(Told(), METHODS, SETTINGS, journal).methods
    assert order[: order.index("block")] == ["model"] * (2 * 3 + 2 * 3 + 2)
    assert set(order[order.index("block") :]) == {"block"}
    for found in (sgd, adam):
        assert found.timing is not None
        assert (found.timing.seconds_per_step, found.timing.optimizer_seconds_per_step, found.timing.ratio) == (
            0.25,
            0.125,
            1.0,
        )
