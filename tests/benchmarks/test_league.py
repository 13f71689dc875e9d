"""The league table: what is weighed, how published claims are judged, and that its page is what its JSON says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from compare.report_cases import made, method, speedup, timing
from league import claims, entries, judging, page

from poise import catalog
from poise.compare import Results
from poise.compare.entries import parse

ROOT = Path(__file__).resolve().parents[2]

RESULTS = ROOT / "docs" / "results"
REFERENCE = [2.00, 2.10, 1.90, 2.05, 1.95]


def weighed(shift: float | None, gap: float = 0.0, **facts: Any) -> Results:
    """AdamW, and an entry "new" whose loss is another by `shift` on every seed, give or take a thousandth."""
    losses: Sequence[float | None] = [None] * 5
    if shift is not None:
        losses = [loss + shift + 0.001 * (-1) ** n for n, loss in enumerate(REFERENCE)]
    lowest = REFERENCE if shift is None or shift > 0 else losses
    new = method("new", losses, REFERENCE, lowest, tuning_gap=gap, **facts)
    return made([method("adamw", REFERENCE, REFERENCE, lowest, tuning_gap=0.0, timing=timing(1.0), speedup=speedup(1.0)), new])


def test_every_optimizer_of_the_catalog_is_weighed() -> None:
    known = parse(",".join(entries.names()))
    rules = {m.name for m in catalog.methods() if m.family == "optim" and m.kind == "optimizer"}
    assert rules <= set(known)
    assert next(iter(known)) == "adamw"


def test_entries_are_called_what_the_comparison_calls_them() -> None:
    assert [entries.called(entry) for entry in entries.names()] == list(parse(",".join(entries.names())))


def test_every_claim_is_of_a_method_in_the_catalog_and_is_judged_or_says_why_not() -> None:
    for claim in claims.CLAIMS:
        assert catalog.get(claim.method).paper.title
        assert claim.judge is not None or claim.why
        assert set(claim.tasks) <= set(entries.TASKS)


@pytest.mark.parametrize("shift, outcome", [(-0.1, "held"), (0.1, "contradicted"), (0.0005, "not seen"), (None, "not judged")])
def test_a_claim_to_be_better_holds_only_beyond_what_seeds_allow(shift: float | None, outcome: str) -> None:
    assert judging.lower("new", "adamw")(weighed(shift)).outcome == outcome


def test_luck_in_tuning_makes_a_tie_of_what_seeds_alone_would_call_a_difference() -> None:
    assert judging.lower("new", "adamw")(weighed(-0.1, gap=0.2)).outcome == "not seen"
    assert judging.lower("new", "adamw")(weighed(-0.1, gap=0.05)).outcome == "held"


@pytest.mark.parametrize("shift, outcome", [(-0.1, "held"), (0.1, "contradicted"), (0.0005, "held"), (None, "not judged")])
def test_a_claim_to_be_as_good_holds_for_a_tie(shift: float | None, outcome: str) -> None:
    assert judging.level("new", "adamw")(weighed(shift)).outcome == outcome


def test_less_state_is_a_share_of_the_others() -> None:
    results = weighed(0.0, state=400)  # 800 of the reference
    assert judging.less_state("new", "adamw", 0.5)(results).outcome == "held"
    assert judging.less_state("new", "adamw", 0.49)(results).outcome == "contradicted"


def test_in_seconds_a_speed_up_is_divided_by_what_a_pass_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    results = weighed(-0.1, timing=timing(1.5), speedup=speedup(1.2))
    new = results.methods[1]
    assert judging.seconds_speedup(results, new) == pytest.approx((1.2 / 1.5, 1.09 / 1.5, 1.33 / 1.5))
    monkeypatch.setitem(judging.PASSES_OF_A_STEP, "new", 2)  # a step is then two passes of 0.75 each
    assert judging.seconds_speedup(results, new) == pytest.approx((1.6, 1.09 / 0.75, 1.33 / 0.75))


def test_an_entry_that_was_not_weighed_is_an_error_and_no_verdict() -> None:
    with pytest.raises(ValueError, match="no entry 'muon'"):
        judging.lower("muon", "adamw")(weighed(0.0))


def committed() -> dict[str, Results]:
    return {task: Results.read(RESULTS / f"{task}.json") for task in entries.TASKS}


@pytest.mark.parametrize("task", entries.TASKS)
def test_the_committed_results_have_the_budget_they_should(task: str) -> None:
    results = committed()[task]
    assert results.reference == "adamw"
    assert results.settings.trials >= 8
    assert results.settings.seeds >= 5
    assert len(results.budgets) == 3


def test_the_page_is_what_the_results_say() -> None:
    assert (RESULTS / "index.md").read_text(encoding="utf-8") == page.render(committed())


def test_the_page_shows_every_entry_every_claim_and_figures_that_exist() -> None:
    text = page.render(committed())
    for task in entries.TASKS:
        table = text.split(f"\n## {task}\n")[1].split("\nEvery run, every trial")[0]
        rows = [line.split("|")[1].strip(" *") for line in table.splitlines() if line.startswith("|")][2:]
        named = text.partition("not weighed yet: ")[2].partition(".")[0].split(", ")
        assert {*rows, *named} >= set(map(entries.called, entries.names()))
    for claim in claims.CLAIMS:
        assert f"{claim.says}. " in text
    figures = re.findall(r"\]\(([\w-]+\.svg)\)", text)
    assert len(figures) == 2 * len(entries.TASKS)
    for figure in figures:
        assert "<svg" in (RESULTS / figure).read_text(encoding="utf-8")
