"""A user's task in a file."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch

from poise.compare import Journal, compare
from poise.compare.tasks import load

from .toys import SETTINGS, SGD, entry, toy_noise

FILE = """
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


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A task whose batches are drawn, as they are needed, from torch's global generator."""
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def test_three_callables_are_enough(file: Path) -> None:
    results = compare(load(str(file)), {"sgd": SGD}, SETTINGS, Journal(file.with_suffix(".db")))
    assert results.task == "mine" and results.methods[0].final is not None


def test_training_goes_round_the_data_in_a_new_order_each_time(file: Path) -> None:
    x = [x for x, _ in islice(load(str(file)).batches("train", 0), 7)]
    assert len({float(batch.sum()) for batch in x}) == 7


def test_noise_drawn_by_a_method_does_not_move_the_data(file: Path) -> None:
    task = load(str(file))

    def data(draws: int) -> list[torch.Tensor]:
        stream = task.batches("train", 1)
        found = []
        for _ in range(5):
            found.append(next(stream)[0])
            torch.rand(draws)
        return found

    assert all(torch.equal(a, b) for a, b in zip(data(0), data(3), strict=True))


def test_every_seed_is_measured_on_the_same_batches(file: Path) -> None:
    task = load(str(file))
    first, second = (torch.cat([x for x, _ in task.batches("tune", seed)]) for seed in (1, 2))
    assert torch.equal(first, second)


def test_a_task_that_takes_a_seed_is_given_it(file: Path) -> None:
    file.write_text(
        FILE.replace("batches(split)", "batches(split, seed)").replace("torch.randn(8, 4)", "torch.full((8, 4), seed)")
    )
    assert float(next(load(str(file)).batches("train", 7))[0][0, 0]) == 7


def test_the_fingerprint_follows_the_file(file: Path) -> None:
    first = load(str(file)).fingerprint
    file.write_text(FILE + "\n")
    assert load(str(file)).fingerprint != first
    file.write_text(FILE + "\nfingerprint = 'data of May'\n")
    assert len({first, load(str(file)).fingerprint}) == 2


@pytest.mark.parametrize(
    "text, message",
    [
        ("def model(): ...\n", r"must define batches\(\), loss\(\)"),
        (FILE.replace("range(3)", "range(0)"), "is empty"),
    ],
)
def test_what_is_missing_is_named(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        next(load(str(file)).batches("train", 0))


def test_a_held_out_split_without_end_is_an_error(file: Path) -> None:
    file.write_text(FILE.replace("for _ in range(3)", "while True"))
    with pytest.raises(ValueError, match="must end"):
        for _ in load(str(file)).batches("report", 0):
            pass


@pytest.mark.parametrize("name", ["no-such-task", "no/such/file.py"])
def test_an_unknown_task_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        load(name)


def test_a_noisy_method_and_a_plain_one_are_a_pair(file: Path) -> None:
    methods = {"plain": SGD, "noisy": entry(toy_noise, "toy_sgd", **SGD.tune)}
    plain, noisy = compare(load(str(file)), methods, SETTINGS, Journal(file.with_suffix(".db"))).methods
    assert [run.loss for run in plain.finals] == [run.loss for run in noisy.finals]
