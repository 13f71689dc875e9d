"""What is going to be written, before it is: tensors, the files that they go to, memory, disk."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .checkpoint import count_rows
from .errors import CheckpointError

UNITS = {"": 1, **{f"{prefix}B": 1000**n for n, prefix in enumerate("KMGT", 1)}}
UNITS |= {f"{prefix}iB": 1024**n for n, prefix in enumerate("KMGT", 1)}

# Blocks of this size glibc always takes from the system and gives back at once; of smaller ones so many were seen to be kept.
MAPPED = 32 * 2**20
KEPT = 3


@dataclass(frozen=True)
class Planned:
    """A tensor that will be stored, under this name, in this shape and dtype."""

    name: str
    shape: torch.Size
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return self.shape.numel()

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def divide(planned: Sequence[Planned], max_shard_bytes: int) -> dict[str, tuple[Planned, ...]]:
    """Files and what goes into each, divided as transformers divides.

    Tensors go in order into a file until the next one would make it larger than `max_shard_bytes`; one that is larger by itself
    gets a file of its own, at once. A single file is `model.safetensors`, of several the second is
    `model-00002-of-00007.safetensors`.

    Raises:
        ValueError: no tensors, a name twice, a name that safetensors keeps for itself, or a size that is not positive.
    """
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} must be positive")
    if not planned:
        raise ValueError("planned is empty: a checkpoint has at least one tensor")
    known: set[str] = set()
    for tensor in planned:
        if tensor.name in known or tensor.name == "__metadata__":
            why = "is there twice" if tensor.name in known else "is the format's own"
            raise ValueError(f"planned: the name {tensor.name!r} {why}")
        known.add(tensor.name)
    shards: list[list[Planned]] = []
    current: list[Planned] = []
    size = 0
    for tensor in planned:
        if tensor.nbytes > max_shard_bytes:
            shards.append([tensor])
            continue
        if size + tensor.nbytes > max_shard_bytes:
            shards.append(current)
            current, size = [], 0
        current.append(tensor)
        size += tensor.nbytes
    if current:
        shards.append(current)
    if len(shards) == 1:
        return {"model.safetensors": tuple(shards[0])}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": tuple(shard) for n, shard in enumerate(shards, 1)}


def tile_rows(tensor: Planned, tile_bytes: int) -> int:
    """How many rows `tile_bytes` hold in float32, or in the stored dtype where that is wider; at least one."""
    return max(1, tile_bytes // max(1, _row_bytes(tensor)))


def stored_tile(tensor: Planned, tile_bytes: int) -> int:
    """Bytes of so many rows in their stored form."""
    rows = count_rows(tensor.shape)
    return min(tile_rows(tensor, tile_bytes), rows) * (tensor.nbytes // max(1, rows))


def planned_memory(
    planned: Iterable[Planned], tile_bytes: int, whole: Callable[[Planned], bool] | None = None, *, held: int = 1
) -> int:
    """Bytes that writing holds at most, where whoever makes the rows holds `held` of them at once, in float32.

    Beside those it has one buffer, in which rows take their stored form, and less than two MB of other things. Blocks of less
    than 32 MB, when freed, the C library may keep for the next ones, three of them at most.
    """
    rows, buffer = 0, 0
    for tensor in planned:
        count = count_rows(tensor.shape)
        at_once = count if whole is not None and whole(tensor) else min(tile_rows(tensor, tile_bytes), count)
        rows = max(rows, at_once * _row_bytes(tensor))
        buffer = max(buffer, stored_tile(tensor, tile_bytes))
    return held * rows + buffer + 2 * 10**6 + (KEPT * rows if rows < MAPPED else 0)


def _row_bytes(tensor: Planned) -> int:
    return tensor.numel // max(1, count_rows(tensor.shape)) * max(4, tensor.dtype.itemsize)


def check_disk(out: Path, nbytes: int) -> None:
    """CheckpointError if the disk of `out`, which need not exist yet, has less than `nbytes` free."""
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if free < nbytes:
        raise CheckpointError(
            f"the weights need {readable(nbytes)} and the disk has {readable(free)} free",
            cure=f"free {readable(nbytes - free)} or write to another disk",
            file=out,
        )


def parse_size(text: str) -> int:
    """Bytes of "5GB", "200 MB", "1.5GiB" or "123"; KB, MB, GB and TB are powers of 1000, KiB and so on of 1024.

    Raises:
        ValueError: for anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): factor for unit, factor in UNITS.items()}
    size = int(float(found[1]) * units[found[2].lower()]) if found and found[2].lower() in units else 0
    if not size:
        raise ValueError(f"size {text!r} must be a positive number of bytes, or one with {', '.join(filter(None, UNITS))}")
    return size


def readable(nbytes: int) -> str:
    """Bytes for people: "1.5 GB"."""
    for factor, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "KB")):
        if nbytes >= factor:
            return f"{nbytes / factor:.1f} {unit}"
    return f"{nbytes} bytes"
