"""A long run that survives its process."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from poise import catalog
from poise.compare.entries import Entry
from poise.compare.fit import CHECKPOINT, Fit, fit
from poise.compare.tasks import Split

from .toys import SGD, Toy

ADAMW = Entry(catalog.get("adamw"), {"lr": 0.01, "state": "int8"})


class Noisy(Toy):
    """Draws from every global generator in every pass, and has dropout and running statistics."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 1))

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return super().loss(model, batch) * (1 + random.random() + float(np.random.rand()))  # noqa: NPY002


def run(folder: Path, **other: Any) -> Fit:
    known: dict[str, Any] = dict(task=Noisy(), entry=ADAMW, seed=3, passes=30, folder=folder, every=7)
    return Fit(**(known | other))


class Killed(BaseException):
    """Nothing is written on the way out."""


def stop_at(passes: int) -> Any:
    taken = 0

    def advance(one: int, loss: float) -> None:
        nonlocal taken
        taken += one
        if taken >= passes:
            raise Killed

    return advance


@pytest.mark.parametrize("stops", [(1,), (7,), (8, 3), (20, 1, 9), (29,)])
def test_a_run_that_is_stopped_and_started_again_is_the_same_run(tmp_path: Path, stops: tuple[int, ...]) -> None:
    whole = fit(run(tmp_path / "whole"))
    for passes in stops:
        with pytest.raises(Killed):
            fit(run(tmp_path / "broken"), stop_at(passes))
    broken = fit(run(tmp_path / "broken"))
    assert (broken.loss, broken.tune_loss) == (whole.loss, whole.tune_loss)
    ours, theirs = (torch.load(tmp_path / name / CHECKPOINT, weights_only=True) for name in ("broken", "whole"))
    assert equal(ours, theirs)
    assert equal(*(load_file(tmp_path / name / "model" / "model.safetensors") for name in ("broken", "whole")))


def equal(a: Any, b: Any) -> bool:
    """To the bit."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def test_a_checkpoint_holds_no_code(tmp_path: Path) -> None:
    fit(run(tmp_path))
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert state["identity"]["method"] == "adamw"


def test_a_write_that_fails_leaves_the_checkpoint_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Killed):
        fit(run(tmp_path), stop_at(8))
    before = (tmp_path / CHECKPOINT).read_bytes()

    def full(state: object, file: Any) -> None:
        file.write(b"half")
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="full"):
            fit(run(tmp_path))
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert run(tmp_path).taken() == 7


@pytest.mark.parametrize(
    "other",
    [{"seed": 4}, {"passes": 31}, {"entry": Entry(SGD)}, {"entry": Entry(ADAMW.method, {"lr": 0.02})}],
    ids=["seed", "passes", "method", "settings"],
)
def test_a_checkpoint_of_another_run_is_not_gone_on_from(tmp_path: Path, other: dict[str, Any]) -> None:
    with pytest.raises(Killed):
        fit(run(tmp_path), stop_at(8))
    with pytest.raises(ValueError, match=r"is of another run: .*--fresh"):
        fit(run(tmp_path, **other))


def test_a_checkpoint_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"checkpoint\.pt cannot be read"):
        fit(run(tmp_path))


def test_a_run_that_diverges_is_stopped_early_and_writes_no_model(tmp_path: Path) -> None:
    found = fit(run(tmp_path, entry=Entry(SGD, {"lr": 1e20}), passes=1000))
    assert found.diverged and found.loss is None and found.passes < 20
    assert not (tmp_path / "model").exists()
    progress = json.loads((tmp_path / "progress.json").read_text())
    assert progress["diverged"] and progress["finished"] and progress["loss"] == {"tune": None, "report": None}


def test_weights_are_written_as_safetensors_with_the_models_names(tmp_path: Path) -> None:
    fit(run(tmp_path))
    assert load_file(tmp_path / "model" / "model.safetensors").keys() == Noisy().model().state_dict().keys()


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)).sum(1, keepdim=True)

    class Task(Toy):
        def model(self) -> nn.Module:
            return Tied()

    fit(run(tmp_path, task=Task()))
    assert len(load_file(tmp_path / "model" / "model.safetensors")) == 1


def test_a_model_that_writes_itself_does(tmp_path: Path) -> None:
    class Own(nn.Linear):
        def save_pretrained(self, folder: Path) -> None:
            (Path(folder) / "own.txt").write_text("mine")

    class Task(Toy):
        def model(self) -> nn.Module:
            return Own(4, 1)

    fit(run(tmp_path, task=Task()))
    fit(run(tmp_path, task=Task()))  # again, over what is there
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["own.txt"]


def test_the_callers_random_numbers_are_left_alone(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), random.random(), float(np.random.rand())  # noqa: NPY002

    def seed() -> None:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002

    seed()
    expected = draw()
    seed()
    fit(run(tmp_path))
    assert draw() == expected


def test_both_held_out_splits_are_read_at_the_end_and_neither_before(tmp_path: Path) -> None:
    asked: list[Split] = []

    class Task(Toy):
        def batches(self, split: Split, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
            asked.append(split)
            return super().batches(split, seed)

    fit(run(tmp_path, task=Task()))
    assert asked == ["train", "tune", "report"]
