"""Files of others: opened, read and parsed so that whatever is wrong with one comes out as a CheckpointError."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError

AGAIN = "fetch the file again"

# A piece of JSON takes some twenty times its length in memory, in the worst case; these bound that.
JSON_BYTES = 32 * 2**20
JSON_BRACKETS = 1_000_000


@dataclass(frozen=True)
class Stamp:
    """What tells that a file is still the one whose header was read."""

    size: int
    changed: int  # nanoseconds
    inode: int

    @staticmethod
    def of(fd: int) -> Stamp:
        found = os.fstat(fd)
        return Stamp(found.st_size, found.st_mtime_ns, found.st_ino)


@contextmanager
def sound(path: Path) -> Iterator[None]:
    """Say what the operating system has against a path in terms of what to do about it."""
    try:
        yield
    except FileNotFoundError as error:
        raise missing(path) from error
    except PermissionError as error:
        raise CheckpointError("may not be read", cure=f"give yourself the right: chmod u+rX {path}", file=path) from error
    except IsADirectoryError as error:
        raise CheckpointError("is a directory, where a file was expected", cure="give the path of a file", file=path) from error
    except OSError as error:
        problem = f"cannot be read: {error.strerror or error}"
        raise CheckpointError(problem, cure="check the disk or the mount, then try again", file=path) from error


def missing(path: Path) -> CheckpointError:
    if path.is_symlink():
        cure = "the download it belongs to is not complete: fetch the model again"
        return CheckpointError(f"is a link to {os.readlink(path)}, which does not exist", cure=cure, file=path)
    cure = "check the path; names of models on a hub are not fetched, download the model first"
    return CheckpointError("does not exist", cure=cure, file=path)


@contextmanager
def opened(path: Path, stamp: Stamp | None = None) -> Iterator[int]:
    """A descriptor of a file, which must be the one of `stamp`."""
    with sound(path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if stamp is not None and Stamp.of(fd) != stamp:
                raise CheckpointError("has changed since it was opened", cure="open the checkpoint again", file=path)
            yield fd
        finally:
            os.close(fd)


def read_bytes(fd: int, offset: int, count: int, path: Path) -> bytes:
    buffer = bytearray(count)
    fill(memoryview(buffer), fd, offset, path)
    return bytes(buffer)


def read_tensor(fd: int, offset: int, shape: torch.Size, dtype: torch.dtype, path: Path) -> Tensor:
    """A new tensor, from bytes as they stand in the file, which are little-endian."""
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.numel():
        flat = tensor.reshape(-1).view(torch.uint8).numpy()
        fill(flat.data, fd, offset, path)
        width = dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize
        if sys.byteorder == "big" and width > 1:
            flat.view(f"u{width}").byteswap(inplace=True)
    return tensor


def fill(buffer: memoryview, fd: int, offset: int, path: Path) -> None:
    done = 0
    while done < len(buffer):
        # One call reads at most 2 GiB.
        count = os.preadv(fd, [buffer[done : done + 2**30]], offset + done)
        if not count:
            problem = f"ends at byte {offset + done}, {len(buffer) - done} bytes too early"
            raise CheckpointError(problem, cure=f"it was cut off: {AGAIN}", file=path)
        done += count


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, no key twice. Work and memory are bounded."""
    with opened(path) as fd:
        size = os.fstat(fd).st_size
        if size > JSON_BYTES:
            problem = f"is {size} bytes long, more than the {JSON_BYTES} a description of weights may have"
            raise CheckpointError(problem, cure="check that it is what its name says", file=path)
        raw = read_bytes(fd, 0, size, path)
    if raw.count(b"[") + raw.count(b"{") > JSON_BRACKETS:
        raise CheckpointError("holds more than a million lists and objects", cure="check what wrote it", file=path)
    if raw.startswith(LFS):
        raise lfs_pointer(path)
    try:
        found = json.loads(raw, object_pairs_hook=_distinct)
    except _Twice as error:
        raise CheckpointError(f"has the key {error.key!r} twice", cure="delete the wrong one", file=path) from None
    except (ValueError, RecursionError) as error:
        reason = "too deep" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"is not JSON ({reason})", cure=f"{AGAIN}, or mend it", file=path) from None
    if not isinstance(found, dict):
        problem = f"must hold a JSON object, not {type(found).__name__}"
        raise CheckpointError(problem, cure=f"{AGAIN}, or mend it", file=path)
    return found


LFS = b"version https://git-lfs"


def lfs_pointer(path: Path) -> CheckpointError:
    cure = "run `git lfs pull` in its repository"
    return CheckpointError("is a Git LFS pointer, a note in place of the weights", cure=cure, file=path)


class _Twice(ValueError):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        raise _Twice(next(key for key, _ in pairs if key in seen or seen.add(key)))
    return found


def check_rows(name: str, shape: torch.Size, start: int, stop: int) -> torch.Size:
    """The shape of rows [start, stop) of a tensor; ValueError for rows that it has not."""
    if not shape:
        if (start, stop) != (0, 1):
            raise ValueError(f"{name!r} has no dimensions, which is one row: rows [{start}, {stop}) are not [0, 1)")
        return shape
    if not 0 <= start <= stop <= shape[0]:
        raise ValueError(f"{name!r} has rows [0, {shape[0]}), not [{start}, {stop})")
    return torch.Size((stop - start, *shape[1:]))
