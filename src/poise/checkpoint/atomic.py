"""Files that are whole or not there: written under a hidden name, forced to the disk, renamed.

Whoever reads a folder while it is written, or after the power failed, finds under a final name the old file or the new one.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MARK = ".tmp-"


class DiskError(Exception):
    """The system refused to write `path`; its own error is the cause."""

    def __init__(self, path: Path, cause: OSError) -> None:
        super().__init__(f"{path}: {cause.strerror}")
        self.path, self.cause, self.full = path, cause, cause.errno in FULL


@contextmanager
def replacing(path: Path) -> Iterator[Callable[[bytes | memoryview], None]]:
    """Give a function that appends bytes; they take the place of `path` when the block ends, and are removed when it fails."""
    temporary = path.with_name(f".{path.name}{MARK}{os.getpid()}")
    try:
        with _named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            yield lambda data: _append(file, data, path)
            with _named(path):
                os.fsync(file)
        finally:
            os.close(file)
        with _named(path):
            os.replace(temporary, path)
            sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def put(path: Path, content: bytes) -> None:
    """Make `content` what `path` holds, if it is not already."""
    if path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content:
        return
    with replacing(path) as write:
        write(content)


def append_line(path: Path, line: str) -> None:
    """Add a line; when this returns it is on the disk. Cut off in the middle, it lacks its end of line."""
    with _named(path):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        try:
            _append(file, f"{line}\n".encode(), path)
            os.fsync(file)
        finally:
            os.close(file)


def remove_temporaries(folder: Path) -> None:
    """Remove what dead runs left unfinished, here and in the folders below."""
    for path in folder.rglob(f".*{MARK}*"):
        if path.name.rpartition(MARK)[2].isdigit():
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Force names to the disk: a renamed file may otherwise have its old name after a power failure."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _append(file: int, data: bytes | memoryview, path: Path) -> None:
    left = memoryview(data).cast("B")
    with _named(path):
        while left:
            left = left[os.write(file, left) :]


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """So that a failure to write is told from a failure to read what is to be written."""
    try:
        yield
    except OSError as error:
        raise DiskError(path, error) from error
