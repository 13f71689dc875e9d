"""A rule's chain cut into stretches that run as one.

It is cut where the unit changes (a matrix rule between element rules) and before a link that measures the update that reaches
it, since its totals must be known before it may go on. Element and block rules stand in one stretch: whatever treats every
element alike does not mind seeing them in blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .links import Bound
from .measuring import measures
from .members import Member


@dataclass(frozen=True)
class Segment:
    """A stretch of a chain: positions of its links, and whether they run as a program, tile by tile ("element" and "block")."""

    positions: tuple[int, ...]
    tiled: bool
    gated: bool  # its first link measures the update, and must be reduced before this stretch runs


def cut(members: Sequence[Member]) -> list[Segment]:
    """The stretches of the chain that these members share, in order."""
    bound = members[0].bound
    segments: list[Segment] = []
    positions: list[int] = []
    for i, b in enumerate(bound):
        gated = measures(b.link) and b.link.reads == "update"
        if positions and (gated or _kind(b) != _kind(bound[positions[0]]) or not _alike(members, positions, i)):
            segments.append(_segment(bound, positions))
            positions = []
        positions.append(i)
    segments.append(_segment(bound, positions))
    if not segments[-1].tiled:
        raise ValueError(f"the last link must be of unit 'element' or 'block', not {bound[-1].link!r}")
    return segments


def _kind(b: Bound) -> str:
    """Links of one kind can stand in one stretch: matrix and tensor rules see the same whole parameters, layer rules others."""
    return {"matrix": "whole", "tensor": "whole", "block": "element"}.get(b.link.unit, b.link.unit)


def _alike(members: Sequence[Member], positions: Sequence[int], joins: int) -> bool:
    """Whether a link sees the blocks that the links before it do, if both see blocks."""
    before = next((i for i in positions if members[0].bound[i].blocks is not None), None)
    if before is None or members[0].bound[joins].blocks is None:
        return True
    return all(m.layouts[m.bound[before].prefix] == m.layouts[m.bound[joins].prefix] for m in members)


def _segment(bound: Sequence[Bound], positions: list[int]) -> Segment:
    first = bound[positions[0]].link
    return Segment(tuple(positions), _kind(bound[positions[0]]) == "element", measures(first) and first.reads == "update")
