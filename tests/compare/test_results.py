"""`results.json` and the table that is made from it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from pydantic import ValidationError
from rich.console import Console

from poise.compare import table
from poise.compare.results import SCHEMA_VERSION, Results, Settings

from .toys import results


def shown(found: Results) -> str:
    console = Console(width=140, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table.render(found))
    return console.export_text()


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    results().write(path)
    assert Results.read(path) == results()
    assert json.loads(path.read_text())["schema_version"] == SCHEMA_VERSION


def test_a_failed_write_leaves_the_results_that_were_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    results().write(path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        results(edges={"lr": "low"}).write(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["{}", "[]", json.dumps({"schema_version": SCHEMA_VERSION + 1})])
def test_another_schema_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match="schema_version"):
        Results.read(tmp_path / "results.json")


@pytest.mark.parametrize("text", ["{", json.dumps({"schema_version": SCHEMA_VERSION, "task": 3})])
def test_a_file_that_is_no_results_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=r"results\.json is no results\.json of poise compare"):
        Results.read(tmp_path / "results.json")


@pytest.mark.parametrize("field", ["trials", "tune_steps", "steps", "seeds"])
def test_an_empty_budget_is_refused(field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        Settings.model_validate({field: 0})


def test_the_table_shows_every_method_with_its_interval_and_the_verdict() -> None:
    text = shown(results())
    (again,) = [line for line in text.splitlines() if "│ again" in line]
    assert [cell.strip() for cell in again.strip("│ ").split("│")] == [
        "again",
        "1.00 ± 0.10",
        "+0 ± 0",
        "1.00× [0.90, 1.10]",
        "8.00",
        "2",
        "1.00",
        "0.1",
        "0 of 3",
    ]
    assert text.rstrip().endswith("adamw and again tie")


def test_an_edge_is_flagged_in_the_row_and_explained_below() -> None:
    text = shown(results(edges={"lr": "high"}))
    assert "0.1!" in text and "adamw: lr was chosen at the high end of its space" in text
    assert "!" not in shown(results())
