"""The header of a safetensors file, read as what it is: input from a stranger.

A file is 8 bytes of length (little-endian), so many bytes of JSON, then the tensors' bytes:

    {"__metadata__": {"format": "pt"}, "wte.weight": {"dtype": "F32", "shape": [64, 8], "data_offsets": [0, 2048]}, ...}

Offsets count from the end of the header. Tensors lie in row-major order, cover their part of the file from its first byte to
its last, and no byte twice. Everything is checked before a tensor is touched; what a reader might understand in two ways, such
as a name given twice, is refused.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .errors import CheckpointError
from .files import AGAIN, LFS, lfs_pointer, read_bytes
from .scanner import DAMAGED, HeaderScanner, short

MAX_HEADER = 100_000_000


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor: what it is, and its bytes [start, stop) of the file."""

    dtype: torch.dtype
    shape: torch.Size
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """What a header says, once it is known to be true.

    Attributes:
        slots: by name, in the order of their bytes.
        metadata: strings.
        digest: of the header's bytes.
    """

    slots: Mapping[str, Slot]
    metadata: Mapping[str, str] = field(default_factory=dict)
    digest: str = ""


def read_header(fd: int, path: Path) -> Header:
    """Read and check the header of an open file. CheckpointError names the file, the tensor and the cure."""
    size = os.fstat(fd).st_size
    if size < 8:
        raise CheckpointError(f"has {size} bytes, too few for a safetensors file", cure=f"it was cut off: {AGAIN}", file=path)
    head = read_bytes(fd, 0, min(size, 32), path)
    if head.startswith(LFS):
        raise lfs_pointer(path)
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER:
        problem = f"claims a header of {length} bytes, more than the {MAX_HEADER} that are allowed"
        raise CheckpointError(problem, cure=f"it is damaged, or no safetensors file: {AGAIN}", file=path)
    if 8 + length > size:
        problem = f"claims a header of {length} bytes, and has {size - 8} bytes after the length"
        raise CheckpointError(problem, cure=f"it was cut off, or is no safetensors file: {AGAIN}", file=path)
    return parse_header(read_bytes(fd, 8, length, path), size - 8 - length, path)


def parse_header(raw: bytes, data: int, path: Path | str | None = None) -> Header:
    """Check a header's JSON against the number of bytes of data that follow it."""
    scan = HeaderScanner(raw, path)
    scan.read()
    begin = 8 + len(raw)
    slots: dict[str, Slot] = {}
    end = 0
    previous = None
    # Stable: what is empty comes before what begins at the same byte, and else in the header's order.
    for name, (dtype, shape, start, stop) in sorted(scan.entries.items(), key=lambda entry: entry[1][2:]):
        if start < end:
            problem = f"its bytes [{start}, {stop}) overlap those of {short(previous or '')!r}, which end at {end}"
            raise CheckpointError(problem, cure=DAMAGED, file=path, tensor=short(name))
        if start > end:
            problem = f"bytes [{end}, {start}) before it belong to no tensor"
            raise CheckpointError(problem, cure=DAMAGED, file=path, tensor=short(name))
        if stop > data:
            problem = f"its bytes end at {stop} of the data, and the file has {data}"
            raise CheckpointError(problem, cure=f"the file was cut off: {AGAIN}", file=path, tensor=short(name))
        slots[name] = Slot(dtype, shape, begin + start, begin + stop)
        end, previous = stop, name
    if end < data:
        problem = f"the last {data - end} bytes belong to no tensor"
        raise CheckpointError(problem, cure=f"something was added to the file, or its header is damaged: {AGAIN}", file=path)
    return Header(slots, scan.metadata, hashlib.sha256(raw).hexdigest())
