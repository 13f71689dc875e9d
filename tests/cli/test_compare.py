"""`poise compare`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from compare.toys import without_seconds

from poise import catalog
from poise.catalog import log_uniform, uniform
from poise.compare import workers
from poise.compare.entries import Entry, parse
from poise.compare.results import Results

SHORT = ["--trials", "2", "--tune-steps", "3", "--steps", "4", "--seeds", "2", "--budgets", "", "--workers", "1"]
RUN = ["compare", "toy.py", "--methods", "toy-sgd,again=toy-sgd", *SHORT]


def test_a_comparison_prints_its_verdict_and_writes_its_results(poise: Callable) -> None:
    ended = poise(*RUN)
    results = Results.read(Path("runs/compare/toy/results.json"))
    assert ended.code == 0
    assert "toy-sgd and again tie" in ended.out and results.verdict.sentence in ended.out
    assert [method.name for method in results.methods] == ["toy-sgd", "again"]
    sizes = dict(trials=2, tune_steps=3, steps=4, seeds=2, seed=0)
    assert results.settings.model_dump() == sizes | dict(budgets=(), threads=1, device="cpu", sampler="joint")


def test_a_comparison_leaves_a_page_that_needs_nothing_else(poise: Callable) -> None:
    poise(*RUN)
    page = Path("runs/compare/toy/report.html").read_text()
    assert Results.read(Path("runs/compare/toy/results.json")).verdict.sentence in page


def test_settings_may_be_swept_one_after_another(poise: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default both are drawn anew in every trial; here a sweep changes one, and leaves the other at the best so far."""
    both = replace(catalog.get("toy-sgd"), name="toy-heavy", tune={"lr": log_uniform(1e-3, 0.5), "momentum": uniform(0.0, 0.9)})
    monkeypatch.setitem(catalog._methods, "toy-heavy", both)
    ended = poise("compare", "toy.py", "--methods", "toy-heavy", "--sampler", "coordinate", "--trials", "7", *SHORT[2:])
    results = Results.read(Path("runs/compare/toy/results.json"))
    assert ended.code == 0 and results.settings.sampler == "coordinate"
    first, *swept = (run.hyper for run in results.methods[0].trials)
    assert len(swept) == 6
    assert {run["momentum"] for run in swept[:3]} == {first["momentum"]} and len({run["lr"] for run in swept[:3]}) == 3
    assert len({run["lr"] for run in swept[3:]}) == 1 and len({run["momentum"] for run in swept[3:]}) == 3


def test_another_comparison_is_set_beside_this_one(poise: Callable) -> None:
    poise(*RUN, "--out", "a")
    ended = poise(*RUN, "--out", "b", "--seed", "1", "--against", "a/results.json")
    assert ended.code == 0 and "here minus there" in ended.out
    assert "Beside the other study" in Path("b/report.html").read_text()
    Path("toy.py").write_text(Path("toy.py").read_text() + "\nfingerprint = 'other'\n")
    ended = poise(*RUN, "--out", "c", "--against", "a/results.json")
    assert ended.code == 2 and "other data" in ended.err and not Path("c").exists()


def test_the_task_may_be_given_either_way_but_not_both(poise: Callable) -> None:
    assert poise("compare", "--task", "toy.py", *RUN[2:]).code == 0
    assert poise("compare", "toy.py", "--task", "toy.py").code == 2


def test_workers_change_nothing_but_the_time(poise: Callable) -> None:
    poise(*RUN, "--out", "one")
    poise("compare", "toy.py", "--methods", "toy-sgd,again=toy-sgd", *SHORT[:-1], "2", "--out", "two")
    one, two = (without_seconds(Results.read(Path(name, "results.json"))) for name in ("one", "two"))
    assert one == two


def test_trials_are_as_long_as_the_final_runs_unless_said(poise: Callable) -> None:
    poise("compare", "toy.py", "--methods", "toy-sgd", "--trials", "1", "--steps", "3", "--seeds", "2", "--out", "o")
    assert Results.read(Path("o/results.json")).settings.tune_steps == 3


def test_json_on_stdout_is_the_file_and_nothing_else(poise: Callable) -> None:
    ended = poise(*RUN, "--json", "--out", "o")
    assert Results.model_validate_json(ended.out) == Results.read(Path("o/results.json"))
    assert ended.err == ""


@pytest.mark.parametrize("more", [[], ["--quiet"], ["--json"]])
def test_no_bar_is_drawn_where_there_is_no_terminal(poise: Callable, more: list[str]) -> None:
    ended = poise(*RUN, *more)
    assert ended.err == "" and "trial 1 of 2" not in ended.out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["toy.py", "--methods", "adamwww"], "unknown method 'adamwww'; did you mean adamw"),
        (["toy.py", "--methods", "toy-sgd,toy-sgd"], "'toy-sgd' stands twice"),
        (["toy.py", "--methods", "toy-sgd,,"], "'' is no name"),
        (["toy.py", "--methods", "a/b=toy-sgd"], "'a/b' is no name"),
        (["code-ml"], "task 'code-ml' is unknown; known: code-lm"),
        (["toys.py", "--methods", "toy-sgd"], "task 'toys.py': no such file"),
        (["toy.py", "--methods", "toy-sgd", "--out", "toy.py"], "toy.py"),
        (["toy.py", "--methods", "toy-sgd", "--budgets", "0.5,x"], "--budgets '0.5,x'"),
        (["toy.py", "--methods", "toy-sgd", "--budgets", "0"], "--budgets '0'"),
        (["toy.py", "--methods", "toy-sgd", "--device", "gpu"], "--device gpu"),
        (["toy.py", "--methods", "toy-sgd(colour=red)"], "cannot be built with {'colour': 'red'}"),
        (["toy.py", "--methods", "toy-sgd", "--against", "nothing.json"], "nothing.json: no such file"),
        (["toy.py", "--methods", "toy-sgd", "--sampler", "sweep"], "--sampler 'sweep': expected joint or coordinate"),
        (["toy.py", "--methods", "toy-sgd", "--sampler", "coordinate", "--trials", "3"], "needs at least 4 to sweep each of 1"),
    ],
)
def test_bad_input_is_named_and_ends_with_two(poise: Callable, arguments: list[str], message: str) -> None:
    ended = poise("compare", *arguments)
    assert ended.code == 2 and ended.out == ""
    assert message in ended.err and len(ended.err.splitlines()) == 1
    assert not Path("runs").exists()


def test_an_alias_is_the_method_under_another_name(poise: Callable) -> None:
    assert parse("toy-sgd, again=toy-sgd") == dict.fromkeys(["toy-sgd", "again"], Entry(catalog.get("toy-sgd")))


def interrupt_after(runs: int, monkeypatch: pytest.MonkeyPatch, how: Callable[[], None]) -> None:
    """Let so many runs finish; interrupt the next."""
    whole = workers.perform
    left = runs

    def run(*arguments: Any) -> object:
        nonlocal left
        if left == 0:
            how()
        left -= 1
        return whole(*arguments)

    monkeypatch.setattr(workers, "perform", run)


def control_c() -> None:
    raise KeyboardInterrupt


def terminated() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("how", [control_c, terminated])
def test_an_interrupted_comparison_ends_with_three_and_the_same_command_goes_on(
    poise: Callable, monkeypatch: pytest.MonkeyPatch, how: Callable[[], None]
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(3, patch, how)
        ended = poise(*RUN)
    assert ended.code == 3 and ended.out == ""
    assert "3 finished runs are kept" in ended.err and "same command" in ended.err
    assert not Path("runs/compare/toy/results.json").exists()
    with monkeypatch.context() as patch:
        taken = []
        patch.setattr("poise.compare.workers.train", lambda *a, **k: taken.append(1) or train(*a, **k))
        from poise.compare.train import train

        assert poise(*RUN).code == 0
    assert len(taken) == 2 * (2 + 2) - 3


def test_fresh_starts_over(poise: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    from poise.compare.train import train

    poise(*RUN)
    taken = []
    monkeypatch.setattr("poise.compare.workers.train", lambda *a, **k: taken.append(1) or train(*a, **k))
    poise(*RUN)
    assert len(taken) == 0
    poise(*RUN, "--fresh")
    assert len(taken) == 2 * (2 + 2)


def test_runs_of_other_code_are_made_again_and_that_is_said(poise: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "other code" not in poise(*RUN).err + poise(*RUN).err
    monkeypatch.setattr("poise.compare.provenance.package_code", lambda: "edited")
    assert "8 finished runs in runs/compare/toy were made by other code" in poise(*RUN).err


def test_fresh_also_clears_a_journal_that_cannot_be_read(poise: Callable) -> None:
    Path("runs/compare/toy").mkdir(parents=True)
    Path("runs/compare/toy/journal.db").write_text("no database " * 100)
    ended = poise(*RUN)
    assert ended.code == 2 and "--fresh starts over" in ended.err
    assert poise(*RUN, "--fresh").code == 0


def test_a_comparison_without_a_verdict_ends_with_one(poise: Callable) -> None:
    Path("toy.py").write_text(Path("toy.py").read_text().replace(".square().mean()", ".square().mean() * float('nan')"))
    ended = poise(*RUN)
    assert ended.code == 1 and "no verdict" in ended.out


def test_without_the_extra_the_program_says_what_to_install(poise: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("poise.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "typer", None)
    ended = poise("methods")
    assert ended.code == 2 and ended.err.strip().endswith('pip install "poise[compare]"') and "typer" in ended.err


@pytest.mark.slow
def test_the_methods_of_the_catalog_are_compared_on_the_embedded_task(poise: Callable) -> None:
    ended = poise("compare", "--methods", "adamw,again=adamw,lion,muon", "--trials", "2", "--steps", "12", "--seeds", "2")
    found = {method.name: method for method in Results.read(Path("runs/compare/code-lm/results.json")).methods}
    assert ended.code == 0
    assert found["again"].to_reference is not None and found["again"].to_reference.model_dump() == dict(mean=0, low=0, high=0)
    assert found["adamw"].finals[0].state_bytes >= 2 * found["lion"].finals[0].state_bytes > 0
    assert all(run.loss is not None and run.loss < 6.0 for method in found.values() for run in method.finals)
