"""The benchmark of memory tells and keeps every row as soon as it is measured, and fails where a promise is broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import memory
import pytest


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Rows whose measuring takes no time; the last raises."""
    rows = [{"name": "A", "bytes_per_param": 8.0, "most": None, "claim": "8"}]
    rows.append({"name": "B", "bytes_per_param": 1.2, "most": 1.1, "claim": "1"})

    def kept(row: memory.Kept) -> dict[str, Any]:
        return rows[int(row.name)]

    monkeypatch.setattr(memory, "kept", kept)
    monkeypatch.setattr(memory, "KEPT", [memory.Kept(str(i), "") for i in range(3)])
    return rows


def test_what_was_measured_before_it_broke_off_is_kept(
    measured: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(IndexError):
        memory.main(["--out", str(tmp_path / "memory.json")])
    assert json.loads((tmp_path / "memory.json").read_text()) == {"state": measured, "peaks": []}
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["state,", "A", "B"]


def test_a_broken_promise_is_an_exit_code(
    measured: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "KEPT", [memory.Kept(str(i), "") for i in range(2)])
    assert memory.main(["--state-only", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["state"] == measured
    measured[1]["most"] = 1.3
    assert memory.main(["--state-only", "--json"]) == 0
