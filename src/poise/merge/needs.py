"""What a merge needs, before it is done."""

from __future__ import annotations

import time
from dataclasses import dataclass

from poise.checkpoint import count_rows
from poise.checkpoint.planned import planned_memory

from .merger import TILE, Merger, tile_rows
from .protocol import observer_of


@dataclass(frozen=True)
class Needs:
    """What a merge needs.

    Attributes:
        read, written: bytes in all, over every pass.
        memory: bytes at most, above what the program itself takes.
        seconds: of reading and casting alone; None if it was not tried.
    """

    read: int
    written: int
    memory: int
    seconds: float | None = None


def needs(merger: Merger, *, timed: bool = False) -> Needs:
    """What a merge will need, from headers.

    Args:
        timed: merge some rows of the largest tensor and throw them away, to say how long it will take at least.
    """
    if merger.adapters is not None:
        nbytes = sum(parent.checkpoint.nbytes for parent in merger.parents)
        return Needs(nbytes, nbytes, 4 * nbytes)
    kind = observer_of(merger.method.function)
    rounds = 0 if kind is None else kind.rounds
    read = 0
    for line in merger.plan.lines:
        size = sum(merger.parents[part.parent].info(part.name).nbytes for part in line.inputs)
        read += size * (1 if line.copied else 1 + rounds)
    # Tiles of every model, as stored and in float32, and in float64 what a method makes of them, some of it after it is freed:
    # merging keeps such memory for the next tile. Election by sign in four models took 65 tiles of 4 MiB.
    held = max((12 * len(line.inputs) + 24 for line in merger.plan.lines), default=0)
    memory = planned_memory(merger.planned, TILE, held=held)
    memory += sum(len(rows.own) * 8 for rows in merger.planner.maps or ())
    found = Needs(read, sum(line.nbytes for line in merger.plan.lines), memory)
    lines = [line for line in merger.plan.lines if not line.copied]
    if not timed or not lines:
        return found
    line = max(lines, key=lambda line: line.nbytes)
    stop = min(tile_rows(line.shape), count_rows(line.shape))
    begun = time.perf_counter()
    for part in line.inputs:
        merger.read(part, 0, stop).mul(1.0).to(line.dtype)
    spent = time.perf_counter() - begun
    sample = line.shape.numel() * stop / count_rows(line.shape)
    entries = sum(line.shape.numel() for line in lines)
    return Needs(found.read, found.written, found.memory, spent / sample * entries * (2 + rounds))
