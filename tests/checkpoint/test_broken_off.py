"""Writing is killed, again and again, and must end as if nothing had been."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.writers import Counting, Forks, broken, contents, plan, written
from poise.checkpoint import CheckpointError, Interrupted, Planned
from poise.checkpoint.journal import JOURNAL

KILLS = 10


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    forks = Forks()
    yield forks
    forks.end()


@pytest.mark.parametrize("power", [False, True], ids=["process", "machine"])
def test_whatever_call_is_the_last_the_next_run_ends_in_the_same_bytes(tmp_path: Path, forks: Forks, power: bool) -> None:
    seen = forks.run("deaths", tmp_path, power=power)
    assert seen["deaths"] > 50
    assert not seen["broken"] and not seen["different"]


@contextmanager
def watching(out: Path) -> Iterator[list[str]]:
    """The files that are seen half-written under a final name, from now to the end of the block."""
    seen: list[str] = []
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            seen.extend(broken(out))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()


def test_killed_ten_times_it_ends_in_the_same_bytes_and_shows_no_half_file(tmp_path: Path, forks: Forks) -> None:
    out, shards = tmp_path / "out", 24
    written(tmp_path / "whole", planned=plan(2 * shards))
    out.mkdir()
    moments = random.Random(0)
    finished: list[int] = []
    with watching(out) as seen:
        for _ in range(KILLS):
            pid = forks.begin("slowly", out, shards=shards, seconds=0.01)
            for _ in range(moments.choice([1, 2])):
                assert forks.line() == "begun"
            # A shard has six tiles, each with its pause: no life sees the end of more than two.
            time.sleep(moments.uniform(0, 0.08))
            os.kill(pid, signal.SIGKILL)
            while (line := forks.line()) == "begun":
                pass
            assert line == str(int(signal.SIGKILL))
            finished.append(len((out / JOURNAL).read_text().splitlines()) - 1)
        assert 0 < finished[-1] < shards and finished == sorted(finished)
        again = written(out, planned=plan(2 * shards))
    assert again.found == finished[-1]
    assert contents(out) == contents(tmp_path / "whole")
    assert not seen


def test_ctrl_c_says_what_is_finished_and_what_is_finished_is_not_made_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Interrupted, match=r"1 of 3 shards are finished .* the same command goes on") as stopped:
        written(out, Counting(10, KeyboardInterrupt()))
    assert isinstance(stopped.value, KeyboardInterrupt)
    assert (stopped.value.finished, stopped.value.shards) == (1, 3)
    assert sorted(contents(out)) == [JOURNAL, "model-00001-of-00003.safetensors"]
    seen: list[tuple[int, int]] = []
    rest = Counting()
    again = written(out, rest, progress=lambda done, total: seen.append((done, total)))
    assert again.found == 1
    assert sorted(set(rest.asked)) == sorted(tensor.name for tensor in plan()[2:])
    assert seen[0] == ((out / "model-00001-of-00003.safetensors").stat().st_size, again.bytes)
    assert seen[-1] == (again.bytes, again.bytes) and seen == sorted(seen)
    nothing = Counting()
    assert written(out, nothing).found == 3 and not nothing.asked


def test_an_error_in_the_rows_is_the_callers_and_leaves_nothing_half(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OSError, match="the input is gone"):
        written(out, Counting(10, OSError(errno.EIO, "the input is gone")))
    assert sorted(contents(out)) == [JOURNAL, "model-00001-of-00003.safetensors"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_and_what_is_finished_is_kept(tmp_path: Path, monkeypatch: Any, code: int) -> None:
    out, real, room = tmp_path / "out", os.write, 1500

    def write(file: int, data: Any) -> int:
        nonlocal room
        if room == 0:
            raise OSError(code, os.strerror(code))
        count = real(file, data[:room])  # what a disk that fills up does: it takes a part
        room -= count
        return count

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        room += 700  # of the journal
        with pytest.raises(CheckpointError, match=r"full; 1 of 3 shards are finished and kept; free 2.0 KB, then") as full:
            written(out)
    assert full.value.file == out / "model-00002-of-00003.safetensors"
    assert sorted(contents(out)) == [JOURNAL, "model-00001-of-00003.safetensors"]
    assert written(out).found == 1
    written(tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_a_system_that_takes_a_few_bytes_at_a_time_is_given_the_rest(tmp_path: Path, monkeypatch: Any) -> None:
    written(tmp_path / "whole")
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: real(file, data[:7]))
        written(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_file_that_the_system_lets_grow_no_further_is_a_full_disk(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1100, before[1]))
    try:
        with pytest.raises(CheckpointError, match="the disk is full; 0 of 2 shards") as full:
            written(tmp_path / "out", max_shard_bytes=1600)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert full.value.file == tmp_path / "out" / "model-00001-of-00002.safetensors"
    assert sorted(contents(tmp_path / "out")) == [JOURNAL]


def test_a_disk_that_is_too_small_is_known_before_work(tmp_path: Path) -> None:
    rows = Counting()
    huge = [Planned("a", torch.Size([2**40, 2**10]), torch.float32)]
    with pytest.raises(CheckpointError, match=r"need 4503\.6 TB and the disk has .* free; free .* or write to another disk"):
        written(tmp_path / "out", rows, planned=huge, config=None)
    assert not rows.asked


def test_a_torn_line_of_the_journal_is_a_shard_that_is_made_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    written(out)
    before = contents(out)
    for cut in (1, 20, 170):  # within the last line, up to a part of the one before
        (out / JOURNAL).write_bytes(before[JOURNAL][:-cut])
        assert written(out).found == (2 if cut < 100 else 1)
        assert contents(out) == before


def test_a_shard_counts_only_with_its_size_and_its_header(tmp_path: Path) -> None:
    out = tmp_path / "out"
    written(out)
    before = contents(out)
    name = "model-00002-of-00003.safetensors"
    data = before[name]
    for other in (data[:-1], data.replace(b'"BF16"', b'"F16" ', 1), b""):
        (out / name).write_bytes(other)
        assert written(out).found == 2
        assert contents(out) == before
    (out / name).unlink()
    assert written(out).found == 2 and contents(out) == before


@pytest.mark.parametrize("tile, tiles", [(2**22, 4.5), (2**25, 1.5)])
def test_memory_does_not_grow_with_the_model_nor_with_a_tensor(tmp_path: Path, forks: Forks, tile: int, tiles: float) -> None:
    found = forks.run("growth", tmp_path / "out", tensors=2, megabytes=64, tile_bytes=tile)
    assert found["bytes"] > 2 * 64 * 2**20
    assert found["grew"] < found["planned"] == tiles * tile + 2 * 10**6


def test_what_dead_runs_left_is_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "1_Pooling").mkdir(parents=True)
    left = [out / ".model.safetensors.tmp-7", out / "1_Pooling" / ".config.json.tmp-123"]
    kept = out / ".notes.tmp-mine"
    for path in [*left, kept]:
        path.write_bytes(b"half")
    (out / "1_Pooling").rename(tmp_path / "1_Pooling")  # nothing but hidden files may be there before the first run
    written(out)
    (tmp_path / "1_Pooling").rename(out / "1_Pooling")
    written(out)
    assert not any(path.exists() for path in left) and kept.exists()


def test_the_journal_has_no_time_and_no_place(tmp_path: Path) -> None:
    written(tmp_path / "a")
    written(tmp_path / "b")
    lines = [json.loads(line) for line in (tmp_path / "a" / JOURNAL).read_text().splitlines()]
    assert [line.get("shard") for line in lines] == [None, *(f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3))]
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
