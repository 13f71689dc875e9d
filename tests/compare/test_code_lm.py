"""The embedded language-model task."""

from __future__ import annotations

import math
import sysconfig
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poise.compare.loop import evaluate
from poise.compare.tasks import Split, load
from poise.compare.tasks.code_lm import Task, sources, split_of

FILES = {f"package/module_{number}.py": f"x_{number} = {number}\n" * 30 for number in range(120)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A small library."""
    for path, source in FILES.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(source)
    return tmp_path


def test_no_file_stands_in_two_splits(root: Path) -> None:
    data = {split: bytes(stream) for split, stream in Task(root).data.items()}
    for source in FILES.values():
        assert sum(source.encode() in stream for stream in data.values()) == 1
    assert all(len(stream) > 0 for stream in data.values())


def test_about_a_tenth_of_the_files_is_held_out() -> None:
    splits = [split_of(path) for path in sources(Path(sysconfig.get_path("stdlib")))]
    assert 0.86 < splits.count("train") / len(splits) < 0.94
    assert 0.02 < splits.count("tune") / len(splits) < 0.08


def test_a_new_file_moves_no_other(root: Path) -> None:
    before = Task(root)
    (root / "package" / "another.py").write_text("pass\n")
    after = Task(root)
    assert {path: after.files[path] for path in before.files} == before.files
    assert all(split_of(path) == split_of(path) for path in before.files)
    assert len(after.files) == len(before.files) + 1


@pytest.mark.parametrize(
    "place", ["test/a.py", "package/tests/a.py", "site-packages/a.py", "_sysconfigdata_x.py", "package/a.txt"]
)
def test_what_is_not_the_standard_librarys_own_code_is_left_out(root: Path, place: str) -> None:
    (root / place).parent.mkdir(exist_ok=True)
    (root / place).write_text("pass\n")
    assert set(Task(root).files) == set(FILES)


def test_the_fingerprint_follows_contents_and_paths(root: Path) -> None:
    first = Task(root).fingerprint
    assert Task(root).fingerprint == first
    some = root / "package" / "module_1.py"
    some.write_text(some.read_text() + "#")
    second = Task(root).fingerprint
    some.rename(some.with_name("renamed.py"))
    assert len({first, second, Task(root).fingerprint}) == 3


def test_a_training_batch_depends_on_seed_and_step_alone(root: Path) -> None:
    task = Task(root)
    first = list(islice(task.batches("train", 3), 4))
    torch.rand(5)
    assert all(torch.equal(a, b) for a, b in zip(first, islice(task.batches("train", 3), 4), strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], next(task.batches("train", 4)))


@pytest.mark.parametrize("split", ["tune", "report"])
def test_every_seed_is_measured_on_the_same_held_out_bytes(root: Path, split: Split) -> None:
    task = Task(root)
    ours, theirs = (torch.cat(list(task.batches(split, seed))) for seed in (1, 2))
    assert torch.equal(ours, theirs) and ours.shape[1] == task.context + 1


class Successor(nn.Module):
    """Knows that every byte is followed by the next number."""

    def forward(self, tokens: Tensor) -> Tensor:
        return 50.0 * F.one_hot(tokens + 1, 256)


def test_what_is_predicted_is_the_next_byte(root: Path) -> None:
    assert float(Task(root).loss(Successor(), torch.arange(20, 40).expand(2, -1))) < 1e-6


def test_too_small_a_corpus_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("pass\n")
    with pytest.raises(ValueError, match="too little Python"):
        next(Task(tmp_path).batches("train", 0))


def test_an_untrained_model_knows_nothing_and_forty_steps_teach_it_more_than_the_frequencies_of_bytes() -> None:
    torch.manual_seed(0)
    task = load("code-lm")
    model = task.model()
    assert evaluate(task, model, "tune", 0) == pytest.approx(math.log(256), abs=0.7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for batch in islice(task.batches("train", 0), 40):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    held_out = torch.cat(list(task.batches("tune", 0)))
    shares = torch.bincount(held_out.flatten()).float() / held_out.numel()
    entropy = -float(torch.special.xlogy(shares, shares).sum())
    assert evaluate(task, model, "tune", 0) < entropy - 0.2
