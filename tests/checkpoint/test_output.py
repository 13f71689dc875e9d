"""A folder is one run's: never two at once, never a mixture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoint.writers import Counting, contents, made, plan, value, written
from poise.checkpoint import CheckpointError, Planned, write
from poise.checkpoint.journal import JOURNAL


def test_a_folder_begun_with_other_inputs_is_not_gone_on_with(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        written(out, Counting(9, KeyboardInterrupt()))
    before = contents(out)
    with pytest.raises(
        CheckpointError, match=r"begun with other inputs, another recipe .*; write to another .* --fresh"
    ) as refused:
        written(out, fingerprint="two")
    assert refused.value.file == out / JOURNAL
    assert contents(out) == before


@pytest.mark.parametrize(
    "other",
    [{"planned": plan(dtype=torch.float16)}, {"max_shard_bytes": 1200}, {"config": {"hidden_size": 8}}, {"side_files": {}}],
)
def test_nor_one_begun_with_another_plan(tmp_path: Path, other: dict[str, Any]) -> None:
    out = tmp_path / "out"
    written(out)
    before = contents(out)
    with pytest.raises(CheckpointError, match=r"begun with another dtype, config or size of shards; .* --fresh"):
        written(out, **other)
    assert contents(out) == before


def test_fresh_starts_over_and_leaves_no_file_of_the_earlier_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    written(out, max_shard_bytes=400)
    (out / "notes.md").write_text("mine")
    (out / "pytorch_model.bin").write_text("older weights")
    done = written(
        out, lambda tensor, start, stop: -value(tensor)[start:stop], fingerprint="two", max_shard_bytes=10**9, fresh=True
    )
    assert done.found == 0
    last = ["pytorch_model.bin", "tokenizer.json"]
    assert sorted(contents(out)) == [JOURNAL, "config.json", "model.safetensors", "notes.md", *last]
    written(tmp_path / "twin", lambda tensor, start, stop: -value(tensor)[start:stop], fingerprint="two", max_shard_bytes=10**9)
    assert contents(tmp_path / "twin").items() <= contents(out).items()


def test_a_folder_that_holds_other_things_is_refused_with_their_names(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".gitattributes").write_text("hidden files are no one's weights")
    for name in ("README.md", "model.safetensors"):
        (out / name).write_text("mine")
    with pytest.raises(
        CheckpointError, match=r"holds README.md, model.safetensors; .* empty folder, or start over .* --fresh"
    ) as refused:
        written(out)
    assert refused.value.file == out
    assert sorted(contents(out)) == [".gitattributes", "README.md", "model.safetensors"]
    written(out, fresh=True)
    assert (out / "README.md").read_text() == "mine"
    assert not (out / "model.safetensors").exists()


def test_weights_that_came_in_between_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    written(out)
    (out / "notes.md").write_text("no weights")
    assert written(out).found == 3
    (out / "model.safetensors").write_text("a loader would take it before the shards")
    with pytest.raises(CheckpointError, match=r"holds model.safetensors;"):
        written(out)


def test_a_journal_that_is_none_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"\n", b"{}\n", b'{"poise": 2}\n', b"\xff\n", b"[]\n"):
        out = tmp_path / f"out{content.hex()}"
        out.mkdir()
        (out / JOURNAL).write_bytes(content)
        with pytest.raises(CheckpointError, match="is not a journal of poise; --fresh starts over"):
            written(out)
        assert written(out, fresh=True).found == 0


def test_a_forged_journal_removes_nothing_outside(tmp_path: Path) -> None:
    out, outside = tmp_path / "out", tmp_path / "outside"
    written(out)
    outside.write_text("mine")
    text = (out / JOURNAL).read_text()
    (out / JOURNAL).write_text(text.replace('"config.json"', f'"../outside", "{outside}"'))
    written(out, fresh=True)
    assert outside.read_text() == "mine"


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    def rows(tensor: Planned, start: int, stop: int) -> Tensor:
        with pytest.raises(CheckpointError, match="out: another process is writing there; wait for it, or write to another"):
            written(tmp_path / "out")
        return made(tensor, start, stop)

    assert written(tmp_path / "out", rows).found == 0
    assert written(tmp_path / "out").found == 3


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="file/out: cannot be written to: Not a directory; choose a folder"):
        write(tmp_path / "file" / "out", plan(), made, fingerprint="one")


def test_side_files_do_not_come_from_where_they_go(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "vocab.txt").write_text("a")
    with pytest.raises(ValueError, match=r"vocab.txt lies in out="):
        written(tmp_path / "out", side_files={"vocab.txt": tmp_path / "out" / "vocab.txt"}, fresh=True)
    assert (tmp_path / "out" / "vocab.txt").exists()
