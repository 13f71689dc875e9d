"""`benchmarks/agreement.py`: what is wrong is noticed, what is missing is said, and what torch has agrees."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from unittest import mock

import agreement
import pytest
import torch
from agreement_cases import ABSENT, CASES, sources
from agreement_cases.case import Case, Problem, difference, stepping
from agreement_cases.page import page
from agreement_cases.repositories import REPOSITORIES

from poise.catalog import methods

ROOT = Path(__file__).resolve().parents[2]
TORCH = [case for case in CASES if case.source == "torch"]
SHORT = Problem(((6, 4), (3,)), steps=20)


def short(rule: str) -> Case:
    return dataclasses.replace(next(case for case in TORCH if case.rule == rule), problem=SHORT)


@pytest.mark.parametrize("case", TORCH, ids=lambda case: f"{case.rule}: {case.settings}")
def test_what_torch_has_agrees(case: Case) -> None:
    found = agreement.compare(case, backend="eager")
    assert found["status"] == "agrees", found


@pytest.mark.parametrize(
    "changed", [{"betas": (0.9, 0.98)}, {"eps": 1e-7}, {"lr": 0.010001}, {"weight_decay": 0.1001}], ids=lambda c: next(iter(c))
)
def test_one_changed_coefficient_of_the_reference_breaks_the_bound(changed: dict[str, float]) -> None:
    settings = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1, **changed}
    case = dataclasses.replace(short("adamw"), theirs=stepping(lambda p, m: m.optim.AdamW(p, **settings)))
    found = agreement.compare(case, backend="eager")
    assert found["status"] == "broken" and found["difference"] > 1e-11


def test_another_polynomial_breaks_the_bound_of_an_iteration_in_bfloat16() -> None:
    muon = next(case for case in TORCH if case.rule == "muon" and case.problem.dtype == torch.float32)
    wrong = stepping(lambda p, m: m.optim.Muon(p, lr=0.02, weight_decay=0.1, ns_coefficients=(3.4445, -4.775, 1.9)))
    assert agreement.compare(dataclasses.replace(muon, theirs=wrong), backend="eager")["status"] == "broken"


def test_a_number_that_is_none_is_infinitely_far_away() -> None:
    start, end, lost = ([torch.full((2,), value)] for value in (0.0, 1.0, float("nan")))
    assert difference([start, lost], [start, end]) == float("inf")
    with pytest.raises(ValueError, match="did not move"):
        difference([start, end], [start, start])


def test_a_missing_reference_is_said_and_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    lost = [dataclasses.replace(short("sgd"), source="nowhere"), dataclasses.replace(short("sgd"), source="google/automl")]
    with mock.patch.dict(sources.PACKAGES, {"nowhere": "nowhere"}), mock.patch.object(agreement, "CASES", lost):
        assert agreement.main(["--json"]) == 0
    package, repository = json.loads(capsys.readouterr().out)["rows"]
    assert package["status"] == repository["status"] == "missing"
    assert "nowhere is not installed" in package["failed"] and "--official" in repository["failed"]


def test_a_reference_that_raises_fails_alone(capsys: pytest.CaptureFixture[str]) -> None:
    broken = dataclasses.replace(short("sgd"), theirs=stepping(lambda p, m: m.optim.Gone(p)))
    with mock.patch.object(agreement, "CASES", [broken, short("sgd")]):
        assert agreement.main(["--backend", "eager", "--json"]) == 1
    assert [row["status"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["failed", "agrees"]


def test_a_checkout_finds_its_neighbours_and_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = tmp_path / "some+one"
    folder.mkdir()
    (folder / "neighbour.py").write_text("lr = 0.05\n")
    (folder / "theirs.py").write_text(
        "import torch\nfrom triton.language import jit\nclass Mine(jit.Base): pass\n@jit\ndef rate():\n"
        "    import neighbour\n    return neighbour.lr\n@torch.compile(dynamic=False)\ndef twice(x): return 2 * x\n"
    )
    there = {"some/one": sources.Repository("0" * 40, "theirs.py", {"theirs.py": "?"}, stubs=("triton", "triton.language"))}
    before, path = set(sys.modules), list(sys.path)
    with mock.patch.dict(REPOSITORIES, there), sources.reference("some/one", tmp_path) as (module, version):
        assert module.rate() == 0.05 and module.twice(2) == 4 and isinstance(module.Mine(), module.Mine)
        assert version == "of another commit"
    assert {"neighbour", "triton"}.isdisjoint(set(sys.modules) - before) and sys.path == path


def test_a_module_of_a_package_finds_its_relatives_and_is_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = tmp_path / "some+one" / "src" / "theirs"
    (package / "parts").mkdir(parents=True)
    (package / "rule.py").write_text("from .parts.rates import lr\nfrom wandb.sdk import log\nprint('using', log(lr=lr))\n")
    (package / "parts" / "rates.py").write_text("lr = 0.05\n")
    one = sources.Repository("0" * 40, "src/theirs/rule.py", {}, folder="src", stubs=("wandb", "wandb.sdk"))
    with mock.patch.dict(REPOSITORIES, {"some/one": one}), sources.reference("some/one", tmp_path) as (module, version):
        assert module.lr == 0.05 and module.__name__ == "theirs.rule" and version == "0" * 7
        assert sys.modules["theirs.parts"] is not None
    assert not [name for name in sys.modules if name.split(".")[0] in ("theirs", "wandb")]
    assert capsys.readouterr().out == ""


def test_the_page_has_every_difference_with_its_reason() -> None:
    found = agreement.compare(short("sgd"), backend="eager")
    lost = found | {"rule": "lost", "difference": None, "failed": "not there"}
    other = found | {"rule": "other", "bound": None, "note": "on purpose"}
    text = page({"torch": "2", "backend": "eager", "rows": [found, lost, other], "absent": [agreement.absence(ABSENT[0])]})
    assert f"| {found['difference']:.1e} | 1.0e-13 | rounding |" in text
    assert f"| {found['difference']:.1e} | on purpose |" in text.partition("## Other defaults")[2]
    assert "| lost | torch | not there |" in text and ABSENT[0].why in text


def test_every_method_that_changes_weights_is_compared_or_it_is_said_why_not() -> None:
    there = {one.rule for one in (*CASES, *ABSENT)}
    assert {found.name for found in methods() if found.family in ("optim", "training", "merge", "adapt")} == there


def test_the_readme_clones_what_is_compared() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text()
    listed = dict(re.findall(r"^([\w.-]+/[\w.-]+) ([0-9a-f]{40})$", text, re.MULTILINE))
    assert listed == {name: repository.commit for name, repository in REPOSITORIES.items()}
