"""Whose a folder is: taken for one run at a time, refused where it holds what that run did not write."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from .atomic import remove_temporaries, sync_folder
from .errors import CheckpointError
from .journal import JOURNAL, Head, Journal

# What a loader may take for the weights, before those written or along with them.
WEIGHTS = re.compile(r".*\.safetensors(\.index\.json)?")
NAMED = 5


@contextmanager
def claimed(out: Path, head: Head, fresh: bool) -> Iterator[Journal]:
    """The journal of `out` with the shards that are finished there, for as long as `out` is ours.

    Raises:
        CheckpointError: another process writes there; unless `fresh`, a journal of another run, or files that no run wrote.
    """
    with _locked(out):
        if fresh:
            _clear(out)
        journal = Journal(out)
        if journal.head is not None and journal.head != head:
            what = "other inputs, another recipe or another version of poise"
            if journal.head.fingerprint == head.fingerprint:
                what = "another dtype, config or size of shards"
            cure = "write to another folder, or start over there with --fresh"
            raise CheckpointError(f"was begun with {what}", cure=cure, file=journal.path)
        strangers = [] if fresh else _strangers(out, head, journal)
        if strangers:
            names = ", ".join(strangers[:NAMED]) + (f" and {len(strangers) - NAMED} more" if strangers[NAMED:] else "")
            raise CheckpointError(f"holds {names}", cure="write to an empty folder, or start over there with --fresh", file=out)
        remove_temporaries(out)
        yield journal


def inside(name: str) -> bool:
    """Whether a relative name stays in the folder that it is relative to."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _strangers(out: Path, head: Head, journal: Journal) -> list[str]:
    """Of a folder without journal every file; of one with a journal what a loader would mistake for the result."""
    there = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    if journal.head is None:
        return there
    return [name for name in there if WEIGHTS.fullmatch(name) and name not in head.files]


def _clear(out: Path) -> None:
    """Remove what an earlier run wrote and what a loader takes for weights; everything else stays.

    Last first, as they were written, and the journal after them: what is left of a folder is always known to be unfinished.
    """
    try:
        head = Journal(out).head
    except CheckpointError:
        head = None
    for name in reversed(head.files if head else ()):
        if inside(name):
            (out / name).unlink(missing_ok=True)
    for path in sorted(out.iterdir(), reverse=True):
        if WEIGHTS.fullmatch(path.name) and not path.is_dir():
            path.unlink()
    sync_folder(out)
    (out / JOURNAL).unlink(missing_ok=True)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """The system gives the lock back when the process ends, however it ends."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        what = f"cannot be written to: {error.strerror}"
        raise CheckpointError(what, cure="choose a folder that can be made and written to", file=out) from error
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            what = "another process is writing there"
            raise CheckpointError(what, cure="wait for it, or write to another folder", file=out) from error
        except OSError:
            pass  # network file systems that lock no folders: then it is up to the user
        yield
    finally:
        os.close(folder)
