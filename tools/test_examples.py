"""The examples that README, CONTRIBUTING and the documentation show are run as they stand."""

from __future__ import annotations

import importlib.util
import re
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conformance.problems import distance, draw, leaves, play

import poise.catalog
import poise.optim

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[str]:
    """The Python examples of a page, in order."""
    found = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for block in found]


def module(name: str, source: str, path: Path) -> ModuleType:
    """`source` as the module `name`, as if it stood in a file of its own."""
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.mark.filterwarnings("ignore:poise. no C.. compiler")
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.name)
def test_the_examples_of_a_page_run_and_move_the_model(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")  # nothing here is about kernels, and compiling takes seconds
    model = torch.nn.Sequential(
        torch.nn.Embedding(16, 64), torch.nn.Linear(64, 64), torch.nn.LayerNorm(64), torch.nn.Linear(64, 16)
    )
    names: dict[str, object] = {"model": model, "__name__": f"example_{page.stem}"}
    for block in blocks(page):
        names.pop("opt", None)
        exec(compile(block, str(page), "exec"), names)
        if isinstance(opt := names.get("opt"), torch.optim.Optimizer):
            before = [p.detach().clone() for p in model.parameters()]
            opt.zero_grad()
            model(torch.arange(16)).square().mean().backward()
            opt.step()
            assert any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)), block


@pytest.mark.filterwarnings("ignore:poise. no C.. compiler")
def test_the_method_that_contributing_adds_is_its_reference_and_its_mutant_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(poise.catalog, "_methods", dict(poise.catalog._methods))
    rule, test = blocks(ROOT / "CONTRIBUTING.md")
    right = module("poise.optim.rules.signum", rule, tmp_path / "signum.py").Signum
    old, new = poise.catalog._methods["signum"].mutant or ("", "")
    assert rule.count(old) == 2, "once in the decorator, once in the rule"
    wrong = module("poise.optim.rules.signum", rule.replace(old, new), tmp_path / "mutant.py").Signum
    monkeypatch.setattr(poise.optim, "Signum", right, raising=False)
    tests = module("test_signum", test, tmp_path / "test_signum.py")
    for hyper in tests.CASES:
        start, grads = draw(missing=[(1, 0), (3, 2)])
        wanted = tests.reference(start, grads, lr=0.01, **hyper)
        gaps = []
        for build in (right, wrong):
            params = leaves(start)
            gaps.append(distance(play(build(params, lr=0.01, backend="eager", **hyper), params, grads), wanted))
        assert gaps[0] < 1e-12
        assert gaps[1] > 1e-3
    own = [name for name in dir(tests) if name.startswith("test_")]
    assert own
    for name in own:
        getattr(tests, name)()
