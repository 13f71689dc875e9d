"""One safetensors file, streamed: its header is known from the plan, its tensors follow a few rows at a time.

    u64 length of the JSON | JSON {"__metadata__": {...}, name: {"dtype", "shape", "data_offsets"}, ...}, padded to 8 | tensors

In the order of the safetensors library, wider dtypes first and names sorted in each, so that every tensor is aligned and the
file is byte for byte the one that `safetensors.torch.save_file` makes of the same tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from .atomic import replacing
from .casting import Caster
from .checkpoint import count_rows
from .dtypes import DTYPES, NAMES
from .journal import checksum
from .planned import Planned, divide, tile_rows

# The order in which the library stores dtypes.
WIDE = ("U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16")
NARROW = ("F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL")
ORDER = {DTYPES[name]: place for place, name in enumerate(WIDE + NARROW)}

Rows = Callable[[Planned, int, int], Tensor]


@dataclass(frozen=True)
class Shard:
    """A file of a checkpoint.

    Attributes:
        name: of the file.
        tensors: in the order in which they lie in it.
        metadata: strings that its header carries.
    """

    name: str
    tensors: tuple[Planned, ...]
    metadata: Mapping[str, str]

    @cached_property
    def header(self) -> bytes:
        """Everything before the first tensor."""
        entries: dict[str, object] = {"__metadata__": dict(self.metadata)} if self.metadata else {}
        end = 0
        for tensor in self.tensors:
            start, end = end, end + tensor.nbytes
            entries[tensor.name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def nbytes(self) -> int:
        """Of the file."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)

    def is_at(self, path: Path) -> bool:
        """Whether a file of this size and with this header is there. Its tensors are not looked at."""
        try:
            with path.open("rb") as file:
                return path.stat().st_size == self.nbytes and file.read(len(self.header)) == self.header
        except OSError:
            return False


def plan_shards(planned: Sequence[Planned], max_shard_bytes: int, metadata: Mapping[str, str]) -> tuple[Shard, ...]:
    """The files that `planned` goes to; the sum of their `nbytes` is what they take on the disk, to the byte.

    Raises:
        ValueError: what `divide` raises, or metadata that are not strings.
        TypeError: a dtype that safetensors has no name for.
    """
    for tensor in planned:
        if tensor.dtype not in ORDER:
            raise TypeError(f"{tensor.name!r}: dtype={tensor.dtype} cannot be stored, only {', '.join(map(str, ORDER))}")
    for key, value in metadata.items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise ValueError(f"metadata {key!r}: {value!r} must be strings")
    return tuple(
        Shard(name, tuple(sorted(tensors, key=lambda tensor: (ORDER[tensor.dtype], tensor.name))), metadata)
        for name, tensors in divide(planned, max_shard_bytes).items()
    )


def write_shard(
    path: Path,
    shard: Shard,
    rows: Rows,
    cast: Caster,
    *,
    tile_bytes: int,
    whole: Callable[[Planned], bool] | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> str:
    """Write `shard` to `path`, which it takes when it is whole and on the disk; returns the BLAKE2b digest of the file.

    `advance` is told how many bytes went by.
    """
    digest = checksum()
    with replacing(path) as write:

        def store(data: bytes | memoryview) -> None:
            write(data)
            digest.update(data)
            advance(len(data))

        def store_rows(tensor: Planned, start: int, stop: int, made: Tensor) -> None:
            shape = torch.Size([stop - start, *tensor.shape[1:]]) if tensor.shape else tensor.shape
            if made.shape != shape:
                raise ValueError(f"{tensor.name!r}: rows [{start}, {stop}) are {tuple(made.shape)} instead of {tuple(shape)}")
            step = tile_rows(tensor, tile_bytes)
            for first in range(start, stop, step):
                last = min(first + step, stop)
                store(cast(tensor, first, last, made[first - start : last - start] if tensor.shape else made))

        store(shard.header)
        for tensor in shard.tensors:
            count = count_rows(tensor.shape)
            step = count if whole is not None and whole(tensor) else tile_rows(tensor, tile_bytes)
            for start in range(0, count if tensor.numel else 0, max(1, step)):
                stop = min(start + step, count)
                # Bound to no name, so that rows are freed before the next are made.
                store_rows(tensor, start, stop, rows(tensor, start, stop))
    return digest.hexdigest()
