"""Parameters as blocks of neighbouring elements, for rules of unit "block": where the blocks lie in what this rank holds.

Blocks are told as runs `((count, elements), ...)`: so many equal blocks, one behind another, then those of the next run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..transform import Param, Slot, Transform
from . import shards
from .views import stored_as, view_of

Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Layout:
    """How a block rule works on one parameter.

    Elements that are blocks of their own lie in any order; others lie one behind another, unless the parameter is stored with
    its inputs first. Shards that cut a block must be put together before the rule can see it.
    """

    runs: Runs  # of this rank's piece; of the whole parameter where it is gathered
    ones: bool  # every block is one element
    turned: bool  # a block is not contiguous in memory
    gathers: bool  # every rank works on the whole parameter
    follows: bool  # state for each block is cut as the parameter is, along its first dimension
    row: int  # elements for each index of the first dimension, as state formats see the parameter

    def suits(self, codec_blocks: Sequence[int]) -> bool:
        """Whether tiles of whole blocks can be decoded and encoded by themselves, for codecs with blocks of these sizes."""
        if self.turned or self.gathers:
            return False
        return self.ones or all(
            (self.row % size == 0 and all(length % size == 0 for _, length in self.runs))
            or all(length == self.row for _, length in self.runs)
            for size in codec_blocks
        )

    def enter(self, p: Param, t: Tensor) -> Tensor:
        """A flat parameter, block after block."""
        return view_of("matrix", p, t.reshape(p.shape)).reshape(-1) if self.turned else t.reshape(-1)

    def leave(self, p: Param, t: Tensor) -> Tensor:
        """The inverse of `enter`."""
        if not self.turned:
            return t.reshape(-1)
        seen = t.reshape(*p.shape[:-2], *p.matrix) if p.role == "experts" else t.reshape(p.matrix)
        return stored_as("matrix", p, seen, p.shape).reshape(-1)


def runs_of(link: Transform, p: Param) -> Runs:
    """A parameter's blocks as its rule declares them, runs of equal blocks joined; ValueError where they do not make it up."""
    told, size = link.blocks(p), p.shape.numel()
    runs: list[tuple[int, int]] = []
    for count, length in ((size, 1),) if told is None else told:
        if count < 0 or length < 0:
            raise ValueError(f"{link!r}: blocks() of {p.name!r} gives {told}: counts and lengths must not be negative")
        if runs and runs[-1][1] == length:
            runs[-1] = (runs[-1][0] + count, length)
        else:
            runs.append((count, length))
    if sum(count * length for count, length in runs) != size:
        raise ValueError(f"{link!r}: blocks() of {p.name!r} gives {told}, which is not its shape {tuple(p.shape)} in all")
    return tuple(runs)


def narrow_slots(link: Transform, p: Param, slots: Mapping[str, Slot]) -> frozenset[str]:
    """A block rule's slots with one value for each block; ValueError for what is neither these nor in the parameter's shape."""
    blocks = sum(count for count, _ in runs_of(link, p))
    found = {name for name, slot in slots.items() if not slot.shared and tuple(slot.shape) != tuple(p.shape)}
    for name in found:
        if math.prod(slots[name].shape) != blocks:
            raise ValueError(
                f"{link!r}: state {name!r} has shape {tuple(slots[name].shape)}, but a 'block' rule keeps the parameter's "
                f"shape {tuple(p.shape)}, or one value for each of its {blocks} blocks"
            )
    return frozenset(found)


def layout(tensor: Any, p: Param, runs: Runs, narrow: Sequence[Slot]) -> Layout:
    """How a rule works on `tensor`, given its blocks and the slots that hold one value for each."""
    row = math.prod(p.shape[1:]) if len(p.shape) > 1 else p.shape.numel()
    each = math.prod(p.shape[1:])
    full = tuple((count, length) for count, length in runs if count * length)
    ones = all(length == 1 for _, length in full)
    turned = p.inputs_first and len(p.shape) > 1 and not ones and sum(count for count, _ in full) > 1
    # the same number of blocks for each index of the first dimension, and state that counts them
    even = bool(p.shape) and len(runs) == 1 and not turned and runs[0][1] > 0 and each % runs[0][1] == 0
    follows = even and all(slot.shape and slot.shape[0] == p.shape[0] for slot in narrow)
    if not shards.is_sharded(tensor):
        return Layout(full, ones, turned, False, follows, row)
    leading = all(getattr(placement, "dim", 0) == 0 for placement in tensor.placements)
    apart = (follows and leading) or (ones and not narrow)
    if apart:
        local = math.prod(shards.box(tensor)[0])
        length = full[0][1] if full else 1
        full = ((local // length, length),) if local else ()
    return Layout(full, ones, turned, not apart and bool(full), follows and leading, row)
