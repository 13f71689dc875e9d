"""The program, run in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from compare.toys import ADAM, SGD

from poise import catalog
from poise.cli import main

TASK = """
import torch
from torch import nn

def model():
    return nn.Linear(4, 1)

def batches(split):
    for _ in range(3):
        x = torch.randn(8, 4)
        yield x, x.sum(1, keepdim=True)

def loss(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()
"""


TOYS = (replace(SGD, name="toy-sgd"), replace(ADAM, name="toy-adam"))


class Ended(NamedTuple):
    """How the program ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def poise(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Ended]:
    """Runs `poise ARGUMENTS` in an empty folder that holds a task `toy.py`; the catalog also knows two toy methods."""
    monkeypatch.chdir(tmp_path)
    Path("toy.py").write_text(TASK)
    catalog.methods()  # what enters itself later would enter the copy and be lost with it
    monkeypatch.setattr(catalog, "_methods", catalog._methods | {method.name: method for method in TOYS})

    def run(*arguments: str) -> Ended:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        captured = capsys.readouterr()
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return Ended(code or 0, captured.out, captured.err)

    return run
