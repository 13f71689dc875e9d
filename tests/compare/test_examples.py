"""The worked examples of tasks."""

from __future__ import annotations

from pathlib import Path

import pytest

from poise import catalog
from poise.compare import Journal, Settings, compare, tasks

FILES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
EXAMPLES = [path for path in FILES if "def batches(" in path.read_text(encoding="utf-8")]  # others are programs
SHORT = Settings.model_validate(dict(trials=1, tune_steps=8, steps=8, seeds=2, budgets=()))


@pytest.mark.hf
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_a_task(path: Path, tmp_path: Path) -> None:
    task = tasks.load(str(path))
    methods = {"adamw": catalog.get("adamw"), "still": catalog.get("sgd")}
    found = compare(task, methods, SHORT, Journal(tmp_path / "journal.db"), timing=False)
    for method in found.methods:
        assert method.final is not None
    assert EXAMPLES and task.unit
    loss, first = found.methods[0].finals[0].loss, found.methods[0].finals[0].initial_loss
    assert loss is not None and first is not None and loss < first
