"""A study of fusions (A Post-Training Enhanced Optimization Approach for Small Language Models, arXiv 2411.02939)."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.cases import mutated
from merge.cutting import family, largest_gap, same

from poise import catalog
from poise.merge.methods.fusion_study import FusionReport, Measurement, fused, fusion_study

EXAMPLE = Path(__file__).parents[3] / "examples" / "fusion_study.py"


def first_entry(weights: object) -> float:
    assert isinstance(weights, dict)
    return float(weights["w"].reshape(-1)[0])


def test_coefficients_of_zero_and_one_are_the_parents_bit_for_bit() -> None:
    _, (one, two) = family(2)
    two["steps"] = one["steps"]
    for rule in ("linear", "slerp"):
        assert same(fused(one, two, rule, 0.0), one) and same(fused(one, two, rule, 1.0), two)
        assert largest_gap(fused(one, two, rule, 0.5), one) > 0.01


def report(study: Any = fusion_study) -> FusionReport:
    start, one, two = ({"w": torch.tensor([[value, 1.0]])} for value in (0.0, 1.0, 3.0))
    return study(start, one, two, first_entry, names=("sft", "kto"), rules=("linear",), coefficients=(0.25, 1.0))


def test_the_report_lists_start_parents_and_fusions_on_one_score() -> None:
    found = report()
    assert [(row.name, row.coefficient, row.score) for row in found.rows] == [
        ("start", None, 0.0),
        ("sft", 0.0, 1.0),
        ("kto", 1.0, 3.0),
        ("linear", 0.25, 1.5),
        ("linear", 1.0, 3.0),
    ]
    assert found.best == Measurement("start", None, 0.0)
    lines = str(found).splitlines()
    assert len(lines) == 6 and lines[1].endswith("0.0000  best") and lines[4].split() == ["linear", "0.25", "1.5000"]


def test_its_tests_tell_it_from_its_mutant() -> None:
    assert [row.score for row in report(mutated(catalog.get("fusion_study"))).rows][3:] == [2.5, 1.0]


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="rules: 'ties' is unknown; known: linear, slerp"):
        fusion_study({}, {}, {}, first_entry, rules=("ties",))  # pyright: ignore[reportArgumentType]


@pytest.mark.filterwarnings("ignore:poise. no C.. compiler")
def test_the_example_runs_and_fusions_of_its_parents_are_between_or_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")  # compiling kernels would take longer than this training
    found = runpy.run_path(str(EXAMPLE))["study"](steps=24, coefficients=(0.0, 0.5, 1.0))
    scores = {(row.name, row.coefficient): row.score for row in found.rows}
    assert set(scores) == {("start", None), ("code", 0.0), ("prose", 1.0)} | {
        (rule, c) for rule in ("linear", "slerp") for c in (0.0, 0.5, 1.0)
    }
    for rule in ("linear", "slerp"):
        assert scores[rule, 0.0] == scores["code", 0.0] and scores[rule, 1.0] == scores["prose", 1.0]
        assert scores[rule, 0.5] < max(scores["code", 0.0], scores["prose", 1.0])
