"""The head of a GGUF file, read as what it is: input from a stranger.

    "GGUF", version u32, count of tensors u64, count of metadata u64,
    metadata: key string, type u32, value;          string: length u64, UTF-8;    array: type u32, length u64, values
    tensors:  name string, count of dimensions u32, dimensions u64 (fastest first), type u32, offset u64
    padding to the alignment, then the tensors' bytes, each padded to the alignment

Nothing tells how long the head is, so every count is held against the bytes that are left before anything is made of it.
Long arrays, which are the vocabulary, are passed over: their type and length are kept.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..errors import CheckpointError
from ..files import AGAIN, read_bytes
from .blocks import KINDS, Kind

MAX_HEAD = 256 * 2**20
MAX_KEPT = 1024
MAX_DIMS = 4  # as in ggml
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Passed:
    """An array too long to keep."""

    kind: int
    length: int


@dataclass(frozen=True, slots=True)
class Block:
    """One tensor: its type of blocks, its shape as torch has it, and its first byte in the file."""

    kind: Kind
    shape: torch.Size
    start: int

    @property
    def nbytes(self) -> int:
        return self.shape.numel() // self.kind.entries * self.kind.nbytes


@dataclass(frozen=True)
class Head:
    """Attributes: metadata; tensors by name, in the order of their bytes; digest of the head's bytes."""

    metadata: Mapping[str, Any]
    blocks: Mapping[str, Block]
    digest: str


def read_head(fd: int, path: Path) -> Head:
    """Read and check the head of an open file. CheckpointError names the file, the tensor and the cure."""
    size = os.fstat(fd).st_size
    scan = _Scanner(fd, size, path)
    if scan.take(4) != b"GGUF":
        scan.fail("does not begin with 'GGUF'")
    version = scan.number("I")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        if swapped in (2, 3):
            scan.fail("is big-endian", cure="get the little-endian file of the same model")
        scan.fail(f"has version {version}, and 2 and 3 are known", cure="convert it with llama.cpp")
    tensors, values = scan.count(24), scan.count(13)
    metadata = scan.metadata(values)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 8 <= alignment <= 2**20 or alignment & (alignment - 1):
        scan.fail(f"has alignment {alignment!r}, which is no power of two from 8 up")
    if metadata.get("split.count", 1) != 1:
        cure = "join the parts with llama.cpp's llama-gguf-split --merge"
        scan.fail(f"is one of {metadata['split.count']} parts", cure=cure)
    found = scan.tensors(tensors, alignment)
    begin = _padded(scan.at, alignment)
    blocks: dict[str, Block] = {}
    end = 0
    for name, (kind, shape, offset) in sorted(found.items(), key=lambda entry: entry[1][2]):
        block = Block(kind, shape, begin + offset)
        if offset != end:
            how = "overlaps the tensor before it" if offset < end else f"leaves {offset - end} bytes before it unused"
            scan.fail(f"begins at {offset} of the data and not at {end}: it {how}", name)
        if block.start + block.nbytes > size:
            problem = f"ends at byte {block.start + block.nbytes}, and the file at {size}"
            scan.fail(problem, name, f"the file was cut off: {AGAIN}")
        blocks[name] = block
        end = _padded(offset + block.nbytes, alignment)
    if begin + end < size:
        scan.fail(f"has {size - begin - end} bytes after its last tensor, which belong to none")
    return Head(metadata, blocks, scan.digest())


def _padded(count: int, alignment: int) -> int:
    return -(-count // alignment) * alignment


class _Scanner:
    """Takes values from the front of a file, and never more than there is."""

    def __init__(self, fd: int, size: int, path: Path) -> None:
        self.fd, self.path = fd, path
        self.size = min(size, MAX_HEAD)
        self.at = 0
        self.window, self.begin = b"", 0

    def take(self, count: int) -> bytes:
        if count > self.size - self.at:
            problem = f"ends within its header: {count} bytes wanted at {self.at} of {self.size}"
            self.fail(problem, cure=f"it was cut off: {AGAIN}")
        if self.at + count > self.begin + len(self.window):
            self.begin = self.at
            self.window = read_bytes(self.fd, self.at, min(max(count, 2**20), self.size - self.at), self.path)
        self.at += count
        return self.window[self.at - count - self.begin : self.at - self.begin]

    def skip(self, count: int) -> None:
        if count > self.size - self.at:
            self.take(count)
        self.at += count

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, least: int) -> int:
        """A number of things that take at least so many bytes each."""
        found = self.number("Q")
        if found > (self.size - self.at) // least:
            problem = f"claims {found} entries, more than its {self.size} bytes can hold"
            self.fail(problem, cure=f"it was cut off or damaged: {AGAIN}")
        return found

    def text(self) -> str:
        raw = self.take(self.count(1))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.fail(f"has a string that is no UTF-8, {raw[:40]!r}")

    def metadata(self, count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self.text()
            if key in found:
                self.fail(f"has the key {key[:200]!r} twice")
            kind = self.number("I")
            found[key] = self.array(key) if kind == _ARRAY else self.value(kind, key)
        return found

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.text()
        if kind not in _SCALARS:
            self.fail(f"has a value of unknown type {kind} under {key[:200]!r}")
        return self.number(_SCALARS[kind])

    def array(self, key: str) -> list[Any] | Passed:
        kind = self.number("I")
        if kind != _STRING and kind not in _SCALARS:
            self.fail(f"has an array of unknown type {kind} under {key[:200]!r}")
        width = 8 if kind == _STRING else struct.calcsize("<" + _SCALARS[kind])
        length = self.count(width)
        if length <= MAX_KEPT:
            return [self.value(kind, key) for _ in range(length)]
        if kind == _STRING:
            for _ in range(length):
                self.skip(self.number("Q"))
        else:
            self.skip(length * width)
        return Passed(kind, length)

    def tensors(self, count: int, alignment: int) -> dict[str, tuple[Kind, torch.Size, int]]:
        found: dict[str, tuple[Kind, torch.Size, int]] = {}
        for _ in range(count):
            name = self.text()
            if name in found:
                self.fail("is in the header twice", name)
            dims = self.number("I")
            if dims > MAX_DIMS:
                self.fail(f"has {dims} dimensions, and at most {MAX_DIMS} are allowed", name)
            sizes = [self.number("Q") for _ in range(dims)]
            number, offset = self.number("I"), self.number("Q")
            kind = KINDS.get(number)
            if kind is None:
                known = ", ".join(k.name for k in KINDS.values())
                self.fail(f"has type {number}, and known are {known}", name, "convert it to one of these with llama-quantize")
            if math.prod(n or 1 for n in sizes) * 8 >= 2**63:
                self.fail(f"has shape {sizes[::-1]}, more than memory can address", name)
            row = sizes[0] if sizes else 1
            if row % kind.entries:
                self.fail(f"has rows of {row} entries, no multiple of the {kind.entries} of {kind.name}", name)
            if offset % alignment:
                self.fail(f"begins at {offset}, no multiple of the alignment {alignment}", name)
            found[name] = kind, torch.Size(sizes[::-1]), offset
        return found

    def digest(self) -> str:
        found = hashlib.sha256()
        for at in range(0, self.at, 2**20):
            found.update(read_bytes(self.fd, at, min(2**20, self.at - at), self.path))
        return found.hexdigest()

    def fail(self, problem: str, tensor: str | None = None, cure: str = f"it is damaged or forged: {AGAIN}") -> NoReturn:
        raise CheckpointError(problem, cure=cure, file=self.path, tensor=tensor if tensor is None else tensor[:200])
