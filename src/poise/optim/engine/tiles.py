"""The tile driver's Python side: what is run over which pieces of which tensors.

A `Launch` is planned once for a set of tensors and then only its pointer table changes from step to step.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from . import kernels

# Elements of a tile: long enough to hide the cost of handing it out. Where kernels hand values on, they do so in strips, a few
# arrays of which fit a core's first cache (measured: 64K, and 32K in strips of 2K).
TILE = 65536
TILE_OF_STRIPS = 32768
STRIP = 2048
# Where a rule sees blocks, a tile is a strip of whole ones, at least one: what is read twice should stay in the second cache.
TILE_OF_BLOCKS = 16384


@dataclass(frozen=True)
class Operand:
    """Where one argument of a kernel is found for a tile."""

    source: Literal["column", "scratch", "noise", "partial"]
    index: int = 0
    block: int = 1  # elements per block; 0: the argument is the same for all tiles of a tensor; OWN
    bytes: int = 4  # stored per block
    entry: int = 4  # bytes of one stored entry


@dataclass(frozen=True)
class Step:
    """One kernel and its operands; `block` elements are one unit of its dynamic size (0: one of the tile's own blocks)."""

    kernel: kernels.Kernel
    operands: tuple[Operand, ...]
    block: int = 1


OWN = -1  # an operand with one entry for each of the tile's own blocks
SOURCES = {"column": 0, "scratch": 1, "noise": 2, "partial": 3}


class Launch:
    """A list of steps over a list of tensors.

    Args:
        steps: kernels in the order they run on each tile.
        columns: width of the pointer table.
        lengths, rows: per tensor, its elements and the elements of one row (encoded state does not cross rows).
        runs: per tensor, pieces (offset, length, global index) contiguous in the whole tensor; a tile never crosses one.
        scratch: number of scratch arrays. partial: bytes of partial results per tile.
        blocks: per tensor, the runs (count, elements) of the blocks that a rule sees; a tile holds whole ones.
        block: largest block of any step: tiles begin at multiples of it within a row.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        columns: int,
        lengths: Sequence[int],
        rows: Sequence[int],
        runs: Sequence[Sequence[tuple[int, int, int]]],
        scratch: int = 0,
        partial: int = 0,
        blocks: Sequence[Sequence[tuple[int, int]]] | None = None,
    ) -> None:
        self.block = max([step.block for step in steps], default=1) or 1
        # results of a tile are summed over all of it, so such a tile is a strip
        whole = not scratch or partial > 0
        self.strip = -(-(TILE if not scratch else STRIP) // self.block) * self.block
        size = self.strip if whole else -(-TILE_OF_STRIPS // self.strip) * self.strip
        self.table = np.zeros((len(lengths), columns), dtype=np.int64)
        self.keys = np.zeros(len(lengths), dtype=np.int32)  # of each tensor's noise in this step
        self.held: list[tuple[dict[str, torch.Tensor], str, torch.Tensor]] = []  # the state tensors whose addresses it has
        self.noise = np.zeros(len(lengths), dtype=np.int64)  # of each tensor's noise, before the step is mixed in
        self.rows = np.maximum(np.asarray(rows, dtype=np.int64), 1)
        pieces: list[np.ndarray] = []
        for tensor, row in enumerate(rows):
            for offset, length, index in runs[tensor]:
                if blocks is None:
                    pieces.append(_cut(tensor, offset, length, index, row if row % self.block else 0, size))
                else:
                    pieces += _cut_blocks(tensor, offset, index, blocks[tensor], row % self.block > 0)
        self.tiles = np.ascontiguousarray(np.concatenate(pieces)) if pieces else np.zeros((0, 6), np.int64)
        if blocks is not None:  # each of its tiles is one strip, so strips are longer than any of them
            self.strip = (int(self.tiles[:, 2].max(initial=0)) // self.block + 1) * self.block
        self.scratch, self.scratch_bytes = scratch, (self.strip + self.block) * 8
        self.partial = np.zeros((len(self.tiles), max(partial, 1)), dtype=np.uint8)
        self.partial_bytes = partial
        flat = [operand for step in steps for operand in step.operands]
        self.args = np.array(
            [[SOURCES[o.source], o.index, o.block, o.bytes, o.entry, o.bytes // o.entry] for o in flat], dtype=np.int64
        )
        first, ops = 0, []
        for step in steps:
            ops.append([step.kernel.address, step.block, first, len(step.operands), self.strip // max(step.block, 1)])
            first += len(step.operands)
        self.ops = np.array(ops, dtype=np.int64)

    def run(self) -> None:
        """Run all steps over all tiles, on torch's number of threads."""
        if not len(self.tiles):
            return
        _driver()(
            self.ops.ctypes.data, len(self.ops), self.args.ctypes.data, len(self.args), self.table.ctypes.data,
            self.table.shape[1], self.rows.ctypes.data, self.keys.ctypes.data, self.tiles.ctypes.data, len(self.tiles),
            self.scratch, self.scratch_bytes, self.strip, self.partial.ctypes.data, self.partial_bytes,
            min(torch.get_num_threads(), len(self.tiles)),
        )  # fmt: skip

    def sums(self, tensors: int, count: int) -> np.ndarray:
        """(tensors, count) partial results added up over the tiles of each tensor, in their order whatever thread ran them."""
        total = np.zeros((tensors, count))
        if len(self.tiles):
            partial = self.partial.reshape(-1).view(np.float64).reshape(len(self.tiles), count)
            owner = self.tiles[:, 0]
            first = np.flatnonzero(np.r_[True, owner[1:] != owner[:-1]])
            total[owner[first]] = np.add.reduceat(partial, first, axis=0)
        return total


def _cut(tensor: int, offset: int, length: int, index: int, row: int, size: int) -> np.ndarray:
    """Tiles of one run; where `row` is given (no block divides it) a tile stays within a row."""
    if row:
        within = np.arange(0, row, size, dtype=np.int64)
        starts = (np.arange(0, length, row, dtype=np.int64)[:, None] + within[None, :]).ravel()
        ends = np.minimum(starts // row * row + row, starts + size)
    else:
        starts = np.arange(0, length, size, dtype=np.int64)
        ends = np.minimum(starts + size, length)
    tiles = np.zeros((len(starts), 6), dtype=np.int64)
    tiles[:, 0], tiles[:, 1], tiles[:, 2], tiles[:, 3] = tensor, offset + starts, ends - starts, index + starts
    return tiles


def _cut_blocks(tensor: int, offset: int, index: int, runs: Sequence[tuple[int, int]], alone: bool) -> list[np.ndarray]:
    """Tiles of whole blocks; with `alone` of one each, as rows that no block of the state's formats divides are worked on."""
    pieces: list[np.ndarray] = []
    first = 0
    for count, length in runs:
        together = 1 if alone else max(TILE_OF_BLOCKS // length, 1)
        starts = np.arange(0, count, together, dtype=np.int64)
        tiles = np.empty((len(starts), 6), dtype=np.int64)
        tiles[:, 0], tiles[:, 1], tiles[:, 2], tiles[:, 3], tiles[:, 4], tiles[:, 5] = (
            tensor, offset + starts * length, np.minimum(count - starts, together) * length, index + starts * length, length,
            first + starts,
        )  # fmt: skip
        pieces.append(tiles)
        first, offset, index = first + count, offset + count * length, index + count * length
    return pieces


@cache
def _driver() -> Callable[..., None]:
    """The compiled driver. It shares torch's own OpenMP runtime, so that there is one pool of threads."""
    source = Path(__file__).with_name("tiles.cpp").read_text()
    cxx = kernels.compiler()
    if cxx is None:
        raise kernels.Unsupported("no C++ compiler found (CXX, g++, clang++, c++)")
    flags = ["-O3", "-std=c++17", "-shared", "-fPIC"]
    runtime = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    if sys.platform.startswith("linux"):
        flags += ["-fopenmp"]
    link = [str(path) for path in runtime[:1]]
    key = hashlib.sha256("\n".join([source, cxx, *flags, *link]).encode()).hexdigest()[:32]
    path = kernels.cache_dir() / f"driver-{key}.so"
    if not path.exists():
        kernels.build(source, path, lambda cpp, folder: [cxx, *flags, cpp, "-o", f"{folder}/kernel.so", *link])
    launch = ctypes.CDLL(str(path)).poise_launch
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    launch.argtypes = [
        pointer, size, pointer, size, pointer, size, pointer, pointer, pointer, size, size, size, size, pointer, size, size,
    ]  # fmt: skip
    launch.restype = None
    return launch


def start() -> None:
    """Compile or load the driver, beside the kernels."""
    kernels.in_background(_driver)
