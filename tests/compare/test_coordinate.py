"""Sweeps of one hyper-parameter after another, and studies across scales (arXiv 2509.02046)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conformance.cases import mutated
from torch import nn

from poise import catalog
from poise.catalog import choice, log_uniform, uniform
from poise.compare import coordinate, sampler, tasks
from poise.compare.entries import Entry
from poise.compare.journal import Job, Journal
from poise.compare.plan import budget
from poise.compare.protocols.across_scales import across_scales
from poise.compare.results import Results, Run, Settings
from poise.compare.study import Nobody, compare
from poise.compare.workers import Inline, Watch

from .toys import ADAM, SETTINGS, SGD, Toy, entry, toy_adam, toy_sgd, without_seconds

TWO = {"sgd": entry(toy_sgd, lr=log_uniform(1e-3, 1.0), momentum=uniform(0.0, 0.9)), "adamw": ADAM}
SWEPT = SETTINGS.model_copy(update={"sampler": "coordinate", "trials": 10})


class Stop(Nobody):
    def __init__(self, at: int) -> None:
        self.left = at

    def advance(self, passes: int) -> None:
        self.left -= passes
        if self.left <= 0:
            raise KeyboardInterrupt


def test_each_sweep_changes_one_hyper_parameter_of_the_best_so_far(tmp_path: Path) -> None:
    for found in compare(Toy(), TWO, SWEPT, Journal(tmp_path / "j.db")).methods:
        names = list(found.space)
        assert [run.number for run in found.trials] == list(range(10))
        for run in found.trials[1:]:
            at = (run.number - 1) // coordinate.SWEEP
            before = [r for r in found.trials[: 1 + at * coordinate.SWEEP] if r.loss is not None]
            best = min(before, key=lambda r: r.loss if r.loss is not None else 9.0).hyper
            assert {key for key in names if run.hyper[key] != best[key]} == {names[at % len(names)]}
        assert found.widened == {}


def test_the_first_trial_is_the_default_and_no_value_is_tried_twice() -> None:
    some = Entry(TWO["sgd"])
    best = sampler.draw(some, 0, 0)
    assert best["lr"] == 0.1
    lrs = [coordinate.draw(some, best, 0, n)["lr"] for n in (1, 2, 3, 7, 8, 9)]
    assert len(set(lrs)) == 6
    assert max(lrs) / min(lrs) > 30


def test_options_take_turns_without_the_best() -> None:
    some = Entry(entry(toy_sgd, kind=choice("a", "b", "c")))
    drawn = [coordinate.draw(some, {"kind": "b"}, 0, number)["kind"] for number in (1, 2, 3, 4)]
    assert drawn == ["a", "c", "a", "c"]


@pytest.mark.parametrize("passes", [1, 13, 31, 70])
def test_an_interrupted_sweep_goes_on_to_the_same_results(tmp_path: Path, passes: int) -> None:
    whole = compare(Toy(), TWO, SWEPT, Journal(tmp_path / "whole.db"))
    with pytest.raises(KeyboardInterrupt):
        compare(Toy(), TWO, SWEPT, Journal(tmp_path / "cut.db"), Stop(passes))
    assert without_seconds(compare(Toy(), TWO, SWEPT, Journal(tmp_path / "cut.db"))) == without_seconds(whole)


class Backwards(Inline):
    """Finishes first what was asked for last, as workers of several processes may."""

    together = 0

    def run(self, jobs: Sequence[Job], watch: Watch) -> Iterator[tuple[int, Run]]:
        self.together = max(self.together, len(jobs))
        yield from ((len(jobs) - 1 - place, run) for place, run in super().run(jobs[::-1], watch))


def test_a_sweep_does_not_hang_on_the_order_in_which_its_trials_are_finished(tmp_path: Path) -> None:
    methods = {name: Entry(method) for name, method in TWO.items()}
    several = Backwards(Toy(), methods)
    found = compare(Toy(), methods, SWEPT, Journal(tmp_path / "two.db"), workers=several, timing=False)
    one = compare(Toy(), methods, SWEPT, Journal(tmp_path / "one.db"), timing=False)
    assert several.together > 1
    assert without_seconds(found) == without_seconds(one)


def test_more_trials_go_on_from_those_there_are(tmp_path: Path) -> None:
    drawn = []
    for trials in (8, 12):
        settings, journal = SWEPT.model_copy(update={"trials": trials}), Journal(tmp_path / f"{trials}.db")
        drawn.append([run.hyper for run in compare(Toy(), TWO, settings, journal, timing=False).methods[0].trials])
    assert drawn[1][:8] == drawn[0]


def test_the_budget_is_that_of_joint_draws() -> None:
    assert budget(TWO, SWEPT) == budget(TWO, SWEPT.model_copy(update={"sampler": "joint"}))


def test_too_few_trials_to_sweep_everything_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trials=6: sampler 'coordinate' needs at least 7 .* 'sgd'"):
        compare(Toy(), TWO, SWEPT.model_copy(update={"trials": 6}), Journal(tmp_path / "j.db"))


def test_an_untuned_baseline_makes_a_speed_up_that_a_sweep_takes_away(tmp_path: Path) -> None:
    """AdamW against itself: the truth is 1."""
    given = dict(trials=7, tune_steps=60, steps=60, seeds=4, budgets=(0.25, 0.5, 2.0, 4.0), sampler="coordinate")
    settings, journal = Settings.model_validate(given), Journal(tmp_path / "j.db")
    rival = entry(toy_adam, "rival", lr=log_uniform(1e-3, 0.5))
    ratios = []
    for baseline in (Entry(ADAM, {"lr": 0.03}), ADAM):
        found = compare(Toy(), {"adamw": baseline, "rival": rival}, settings, journal, timing=False).methods[1].speedup
        assert found is not None
        ratios.append(found.ratio)
    assert ratios[0] > 1.5
    assert 0.67 < ratios[1] < 1.5


class Wider(Toy):
    name = "toy-wide"

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def scales(folder: Path, target: Any = across_scales, **change: Any) -> dict[tuple[str, int], Results]:
    settings = SETTINGS.model_copy(update={"trials": 7, "budgets": (0.5, 2.0)})
    given: dict[str, Any] = {"tasks": [Toy(), Wider()], "methods": TWO, "settings": settings, "steps": (8, 16)}
    return target(**(given | {"folder": folder} | change))


def test_every_size_and_budget_is_tuned_for_itself_and_judged_at_the_end(tmp_path: Path) -> None:
    found = scales(tmp_path)
    assert list(found) == [("toy", 8), ("toy", 16), ("toy-wide", 8), ("toy-wide", 16)]
    for (task, steps), results in found.items():
        assert results.settings.sampler == "coordinate"
        for method in results.methods:
            assert all(run.passes == steps or run.diverged for run in method.trials) and len(method.trials) == 7
            assert [run.passes for run in method.finals] == [steps] * 3
            assert method.speedup is not None
        stored = Results.read(tmp_path / f"{task}-{steps}" / "results.json")
        assert stored.model_dump_json() == results.model_dump_json()
        assert sorted(stored.verdict.halfway) == sorted(stored.verdict.ranking) == ["adamw", "sgd"]
    assert len({run.loss for results in found.values() for run in results.methods[0].trials[:1]}) == 4


def test_its_tests_tell_it_from_its_mutant(tmp_path: Path) -> None:
    wrong = scales(tmp_path, mutated(catalog.get("across-scales")), tasks=[Toy()], steps=(8,))
    assert wrong["toy", 8].settings.sampler == "joint"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"methods": {"sgd": SGD}}, "adamw must be one of them"),
        ({"tasks": [Toy(), Toy()]}, "name of its own"),
        ({"settings": SETTINGS}, "trials=3"),
    ],
)
def test_what_makes_no_study_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scales(tmp_path, **change)
    assert not list(tmp_path.iterdir())


def test_the_language_model_comes_in_three_sizes() -> None:
    known = {name: tasks.load(name) for name in ("code-lm-small", "code-lm", "code-lm-large")}
    assert [task.name for task in known.values()] == list(known)
    sizes = [sum(p.numel() for p in task.model().parameters() if p.ndim > 1) for task in known.values()]
    assert sizes[0] * 3 < sizes[1] < sizes[2] / 3


def test_a_room_that_needs_an_extra_is_left_out_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = catalog.importlib.import_module

    def without(name: str) -> Any:
        if name.startswith("poise.compare"):
            raise ModuleNotFoundError("No module named 'optuna'", name="optuna")
        return real(name)

    monkeypatch.setattr(catalog.importlib, "import_module", without)
    assert catalog.methods()
    monkeypatch.setattr(catalog, "NEEDS_EXTRA", set())
    with pytest.raises(ModuleNotFoundError, match="optuna"):
        catalog.methods()
