"""Which number in a name is that of the layer: the one over which equal sets of names repeat."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from .words import EXPERT

# A block that is there once cannot repeat. It counts for this much: more than chance likeness, less than true repetition.
ALONE = 0.5
ALIKE = 2 / 3  # from here on blocks repeat, however many extra names the first one has
LEAST = 0.25  # of what counts at all


@dataclass(frozen=True)
class Where:
    """The place of a tensor among the layers.

    Attributes:
        stack: path before the number, with "*" for the numbers of stages around it: `model.layers`, `encoder.stages.*.layers`.
        layer: counted through the stages; in a plain stack the number itself.
        inside: the name behind the number.
    """

    stack: str
    layer: int
    inside: str


def layers(names: Iterable[str]) -> dict[str, Where]:
    """Name -> place, of those names that lie in a layer.

    A number may stand at several places of a name (`block.3.layer.1`, `stages.0.blocks.2`). How alike blocks are is, for each
    path before a number, the mean Jaccard index of the names in consecutive ones, `|A & B| / |A | B|`, stages of one kind taken
    together. The outermost number whose blocks are alike is the layer's; where none are, that of the most alike ones. Experts
    are no layers, however many a block has.
    """
    names = list(names)
    blocks: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    places = {name: list(_numbers(name)) for name in names}
    for found in places.values():
        for before, number, behind in found:
            blocks[before][number].add(_starred(behind) if EXPERT.search(behind) else behind)
    pairs: dict[str, list[float]] = defaultdict(list)
    for before, found in blocks.items():
        pairs[_starred(before)] += likeness(found)
    alike = {before: fmean(pairs[_starred(before)] or [_alone(blocks[before])]) for before in blocks}
    chosen: dict[str, tuple[str, int, str]] = {}
    for name, candidates in places.items():
        likely = [place for place in candidates if alike[place[0]] >= LEAST]
        repeated = [place for place in likely if alike[place[0]] >= ALIKE]
        if likely:
            chosen[name] = repeated[0] if repeated else max(likely, key=lambda place: alike[place[0]])
    counted = _through_stages({(before, number) for before, number, _ in chosen.values()})
    return {name: Where(_starred(before), counted[before, number], behind) for name, (before, number, behind) in chosen.items()}


def likeness(blocks: Mapping[int, set[str]]) -> list[float]:
    """How alike consecutive blocks are, each in [0, 1]; empty of a single one."""
    sets = [blocks[number] for number in sorted(blocks)]
    return [len(a & b) / len(a | b) for a, b in pairwise(sets)]


def _alone(blocks: Mapping[int, set[str]]) -> float:
    """Of a single block: it must be the first and have parts, or it is a numbered layer of its own, as `classifier.1`."""
    return ALONE if 0 in blocks and any("." in name for name in blocks[0]) else 0.0


def expert_of(name: str) -> int | None:
    """The number of a numbered expert: `...experts.5.w1.weight`."""
    parts = name.split(".")
    for before, part in pairwise(parts):
        if part.isdigit() and EXPERT.search(before):
            return int(part)
    return None


def _numbers(name: str) -> Iterable[tuple[str, int, str]]:
    """(path before, number, name behind) of every number in a name that may be a layer's."""
    parts = name.split(".")
    for at, part in enumerate(parts):
        if part.isdigit() and not (at and EXPERT.search(parts[at - 1])):
            yield ".".join(parts[:at]), int(part), ".".join(parts[at + 1 :])


def _starred(before: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in before.split("."))


def _through_stages(found: Iterable[tuple[str, int]]) -> dict[tuple[str, int], int]:
    """Layers of stages, `stages.1.blocks.0`, counted on from those of the stages before."""
    families: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for place in found:
        families[_starred(place[0])].append(place)
    counted = {}
    for starred, members in families.items():
        members.sort(key=lambda place: ([int(part) for part in place[0].split(".") if part.isdigit()], place[1]))
        for index, place in enumerate(members):
            counted[place] = index if "*" in starred else place[1]
    return counted
