"""`poise report`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from compare.report_cases import full, later, minimal

from poise.compare import report
from poise.compare.against import set_beside
from poise.compare.report import pages


@pytest.fixture(autouse=True)
def studies(poise: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished comparisons in `mine`, `later` and `other`, the last of another task."""
    monkeypatch.setattr(pages, "get_plotlyjs", lambda: "/* plotly.js */")
    for name, results in (("mine", full()), ("later", later()), ("other", minimal())):
        results.write(Path(name, "results.json"))


@pytest.mark.parametrize("where", ["mine", "mine/results.json"])
def test_the_report_is_made_anew_beside_its_results(poise: Callable, where: str) -> None:
    ended = poise("report", where)
    assert ended.code == 0 and ended.err == ""
    assert Path("mine/report.html").read_text(encoding="utf-8") == report.render(full())
    assert full().verdict.sentence in ended.out and "written: mine/report.html" in ended.out


def test_out_says_where_it_is_written(poise: Callable) -> None:
    assert poise("report", "mine", "--out", "new/page.html", "--quiet") == (0, "", "")
    assert Path("new/page.html").exists() and not Path("mine/report.html").exists()


@pytest.mark.parametrize("where", ["later", "later/results.json"])
def test_another_comparison_is_set_beside_it_in_the_file_and_in_the_terminal(poise: Callable, where: str) -> None:
    ended = poise("report", "mine", "--against", where)
    assert ended.code == 0
    assert Path("mine/report.html").read_text(encoding="utf-8") == report.render(full(), later())
    assert "better here" in ended.out and "only there: newton" in ended.out


def test_json_says_where_the_report_is_and_what_was_found(poise: Callable) -> None:
    found = json.loads(poise("report", "mine", "--against", "later", "--json").out)
    assert found["report"] == "mine/report.html" and found["verdict"] == full().verdict.model_dump()
    assert found["against"] == [row.as_dict() for row in set_beside(full(), later())]
    assert json.loads(poise("report", "mine", "--json").out)["against"] == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere"], "nowhere: no such file"),
        (["."], "results.json: no such file"),
        (["toy.py"], "toy.py is no results.json of poise compare"),
        (["mine", "--against", "nowhere"], "nowhere: no such file"),
        (["mine", "--against", "other"], "task is 'code-lm' here and 'mine' there"),
        (["mine", "--out", "later"], "later"),
    ],
)
def test_bad_input_is_named_and_ends_with_two(poise: Callable, arguments: list[str], message: str) -> None:
    ended = poise("report", *arguments)
    assert ended.code == 2 and ended.out == ""
    assert message in ended.err and len(ended.err.splitlines()) == 1
    assert not Path("mine/report.html").exists()


def test_another_schema_is_refused(poise: Callable) -> None:
    Path("mine/results.json").write_text('{"schema_version": 1}')
    ended = poise("report", "mine")
    assert ended.code == 2 and "schema_version is 1, this version of poise reads 2" in ended.err
