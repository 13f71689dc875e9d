"""The driver: every element of every tensor once, in tiles, whatever blocks its state is kept in."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from poise.optim.engine import tiles
from poise.optim.engine.kernels import Kernel
from poise.optim.engine.tiles import Launch, Operand, Step

Run = ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_int64), ctypes.c_int64)
ELEMENTS = Operand("column", 0)


def step(work: Callable[[Sequence[int], int], None], operands: Sequence[Operand], block: int = 1) -> tuple[Step, Any]:
    """A kernel written in Python (it runs on one thread), and what must be kept alive while it is used."""
    function = Run(lambda pointers, n: work(pointers[: len(operands)], n))
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return Step(Kernel(address, ()), tuple(operands), block), function


def at(pointer: int, n: int, dtype: Any) -> np.ndarray:
    """The memory that a kernel is handed."""
    width = np.dtype(dtype).itemsize
    return np.ctypeslib.as_array((ctypes.c_uint8 * (n * width)).from_address(pointer)).view(dtype)


@pytest.fixture(autouse=True)
def one_thread_and_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(tiles, "TILE", 100)
    monkeypatch.setattr(tiles, "TILE_OF_STRIPS", 64)
    monkeypatch.setattr(tiles, "STRIP", 64)


def launch(
    steps: Sequence[Step], arrays: Sequence[Sequence[np.ndarray]], rows: Sequence[int] | None = None, **extra: Any
) -> Launch:
    """A launch over tensors that lie whole in one process; `arrays`: for each column, one array for each tensor."""
    lengths = [len(a) for a in arrays[0]]
    made = Launch(steps, len(arrays), lengths, rows or lengths, [[(0, n, 0)] if n else [] for n in lengths], **extra)
    for column, tensors in enumerate(arrays):
        made.table[:, column] = [a.ctypes.data for a in tensors]
    return made


def test_every_element_is_worked_on_once() -> None:
    tensors = [np.zeros(n, dtype=np.float32) for n in (1, 99, 100, 101, 1234, 0)]

    def count(pointers: Sequence[int], n: int) -> None:
        assert 0 < n <= 100
        at(pointers[0], n, np.float32)[:] += 1

    one, alive = step(count, [ELEMENTS])
    launch([one], [tensors]).run()
    assert all((t == 1).all() for t in tensors)
    del alive


def test_a_launch_may_be_run_again_with_other_pointers() -> None:
    first, second = np.zeros(250, dtype=np.float32), np.zeros(250, dtype=np.float32)

    def count(pointers: Sequence[int], n: int) -> None:
        at(pointers[0], n, np.float32)[:] += 1

    one, alive = step(count, [ELEMENTS])
    made = launch([one], [[first]])
    made.run()
    made.table[0, 0] = second.ctypes.data
    made.run()
    assert (first == 1).all() and (second == 1).all()
    del alive


def test_a_launch_over_nothing_runs_nothing() -> None:
    def never(pointers: Sequence[int], n: int) -> None:
        raise AssertionError

    one, alive = step(never, [ELEMENTS])
    launch([one], [[np.zeros(0, dtype=np.float32)]]).run()
    launch([one], [[]]).run()
    del alive


def test_noise_is_keyed_by_tensor_and_counted_by_global_index() -> None:
    seen: dict[int, list[tuple[int, int]]] = {}

    def look(pointers: Sequence[int], n: int) -> None:
        key, index = at(pointers[0], 2, np.int32).tolist()
        seen.setdefault(key, []).append((index, n))

    one, alive = step(look, [Operand("noise", block=0), ELEMENTS])
    tensors = [np.zeros(250, dtype=np.float32), np.zeros(30, dtype=np.float32)]
    made = Launch([one], 1, [250, 30], [250, 30], [[(0, 120, 5000), (120, 130, 9000)], [(0, 30, 0)]])
    made.table[:, 0] = [t.ctypes.data for t in tensors]
    made.keys[:] = [7, -8]
    made.run()
    assert sorted(seen[7]) == [(5000, 100), (5100, 20), (9000, 100), (9100, 30)]
    assert seen[-8] == [(0, 30)]
    del alive


def test_what_is_the_same_for_a_whole_tensor_does_not_move_with_its_tiles() -> None:
    tensors = [np.zeros(250, dtype=np.float32), np.zeros(120, dtype=np.float32)]
    rows = [np.array([2.0], dtype=np.float32), np.array([3.0], dtype=np.float32)]

    def fill(pointers: Sequence[int], n: int) -> None:
        at(pointers[0], n, np.float32)[:] = at(pointers[1], 1, np.float32)[0]

    one, alive = step(fill, [ELEMENTS, Operand("column", 1, 0, 0, 1)])
    launch([one], [tensors, rows]).run()
    assert (tensors[0] == 2).all() and (tensors[1] == 3).all()
    del alive


def test_scratch_hands_values_from_one_kernel_to_the_next() -> None:
    source, target = np.arange(333, dtype=np.float32), np.zeros(333, dtype=np.float32)
    lengths: list[int] = []

    def double(pointers: Sequence[int], n: int) -> None:
        lengths.append(n)
        at(pointers[1], n, np.float32)[:] = 2 * at(pointers[0], n, np.float32)

    def shift(pointers: Sequence[int], n: int) -> None:
        at(pointers[1], n, np.float32)[:] = at(pointers[0], n, np.float32) + 1

    first, a = step(double, [ELEMENTS, Operand("scratch", 0)])
    second, b = step(shift, [Operand("scratch", 0), Operand("column", 1)])
    launch([first, second], [[source], [target]], scratch=1).run()
    assert np.array_equal(target, 2 * source + 1)
    assert max(lengths) == 64  # tiles are smaller where they are to stay in the cache
    del a, b


def test_sums_of_tiles_are_added_up_for_each_tensor() -> None:
    tensors = [np.arange(250, dtype=np.float32), np.zeros(0, dtype=np.float32), np.ones(3, dtype=np.float32)]

    def total(pointers: Sequence[int], n: int) -> None:
        values = at(pointers[0], n, np.float32).astype(np.float64)
        at(pointers[1], 1, np.float64)[:] = values.sum()
        at(pointers[2], 1, np.float64)[:] = n

    one, alive = step(total, [ELEMENTS, Operand("partial", 0, 0, 8, 8), Operand("partial", 8, 0, 8, 8)])
    made = launch([one], [tensors], partial=16)
    for _ in range(2):  # a second run does not add to the first
        made.run()
        assert made.sums(3, 2).tolist() == [[249 * 250 / 2, 250], [0, 0], [3, 3]]
    del alive


# -- blocks -------------------------------------------------------------------------------------------------------------------

BLOCK = 16


def _encoded(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes (one byte for each element, rows apart) and scales (one float32 for each block) of a matrix of zeros."""
    blocks = -(-columns // BLOCK)
    return np.zeros(rows * columns, dtype=np.int8), np.zeros(rows * blocks, dtype=np.float32)


CODES, SCALES = Operand("column", 1, BLOCK, BLOCK, 1), Operand("column", 2, BLOCK, 4, 4)


@pytest.mark.parametrize(("rows", "columns"), [(1, 5), (3, 16), (4, 40), (5, 100), (2, 333), (7, 64), (1, 1000)])
def test_blocks_do_not_cross_rows_and_the_short_last_one_is_padded_with_zeros(rows: int, columns: int) -> None:
    """Written behind the end of a row would be the beginning of the next."""
    values = np.arange(1, rows * columns + 1, dtype=np.float32)
    codes, scales = _encoded(rows, columns)
    behind: list[np.ndarray] = []

    def bring(pointers: Sequence[int], n: int) -> None:
        at(pointers[1], n, np.float32)[:] = at(pointers[0], n, np.float32)

    def encode(pointers: Sequence[int], n: int) -> None:
        block = at(pointers[0], n * BLOCK, np.float32).reshape(n, BLOCK)
        at(pointers[2], n, np.float32)[:] = block.sum(1)
        stored = at(pointers[1], n * BLOCK, np.int8).reshape(n, BLOCK)
        behind.append(stored[block == 0].copy())
        stored[:] = (block % 100 - 50).astype(np.int8)

    first, a = step(bring, [ELEMENTS, Operand("scratch", 0)])
    second, b = step(encode, [Operand("scratch", 0), CODES, SCALES], BLOCK)
    guard = np.full(64, 77, dtype=np.int8)
    held = np.concatenate([codes, guard])
    launch([first, second], [[values], [held], [scales]], rows=[columns], scratch=1).run()
    matrix = values.reshape(rows, columns)
    padded = np.pad(matrix, ((0, 0), (0, -columns % BLOCK))).reshape(rows, -1, BLOCK)
    assert np.array_equal(scales.reshape(rows, -1), padded.sum(2))
    assert np.array_equal(held[: rows * columns].reshape(rows, columns), (matrix % 100 - 50).astype(np.int8))
    assert (held[rows * columns :] == 77).all()
    assert not np.concatenate(behind).any(), "what a kernel reads behind the end is zero"
    del a, b


@pytest.mark.parametrize("row", [5, 16, 40, 100, 333])
def test_tiles_begin_where_blocks_begin(row: int) -> None:
    one, alive = step(lambda pointers, n: None, [CODES], BLOCK)
    made = Launch([one], 2, [row * 6], [row], [[(0, row * 6, 0)]], scratch=1)
    covered = np.zeros(row * 6, dtype=int)
    for _, offset, length, index, *_ in made.tiles.tolist():
        assert index == offset
        assert offset % row % BLOCK == 0
        assert row % BLOCK == 0 or offset // row == (offset + length - 1) // row, "a row no block divides is not left"
        covered[offset : offset + length] += 1
    assert (covered == 1).all()
    del alive
