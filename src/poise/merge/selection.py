"""The largest entries of a whole model: exactly so many, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from poise.checkpoint import CheckpointError

from .protocol import Place

Scope = Literal["model", "tensor"]
HALF = 1 << 16
NEVER = 2**63 - 1


@dataclass
class Cut:
    """Where the kept scores of one model end: those with a greater bit pattern, and of the equal ones those up to `last`."""

    wanted: Fraction = Fraction(0)  # entries to keep
    size: int = 0
    bits: int = -1  # pattern of the smallest score that is kept; -1: all are
    rest: int = 0  # how many with that pattern
    met: int = 0
    last: int = NEVER  # index, in the whole model, of the last of them


class Largest:
    """Which floor(k d) of d scores are the largest; of equal ones, those with the lower index in the whole model.

    Nonnegative float32 numbers are ordered as their bit patterns are. The scores are seen three times: the first time the upper
    16 bits are counted, the second time the lower ones of those that share the deciding upper ones, and the third time the
    place is found of the last one kept among equals. That takes 512 KiB a model, for any size; nothing is sorted.

    Args:
        count: of models, each with scores of its own.
        scope: "model" for one threshold over all tensors, "tensor" for one in each.
    """

    rounds = 3

    def __init__(self, count: int, scope: Scope = "model") -> None:
        if scope not in ("model", "tensor"):
            raise ValueError(f"trim_scope={scope!r}: must be 'model' or 'tensor'")
        self.scope, self._cuts = scope, [dict[str, Cut]() for _ in range(count)]
        self._counts, self._seen = torch.zeros(count, HALF, dtype=torch.int64), 0

    def see(self, round: int, place: Place, scores: Sequence[Tensor], density: Sequence[float]) -> None:
        """Take in scores of rows, one tensor for each model. `density` is k."""
        for number, score in enumerate(scores):
            if round == 0:
                _check(place, number, score, density[number])
            cut, bits = self._cut(number, place), pattern(score)
            if round == 0:
                cut.wanted += share(density[number]) * bits.numel()
                cut.size += bits.numel()
                self._counts[number] += torch.bincount(bits >> 16, minlength=HALF)
            elif round == 1 and cut.bits >= 0:
                lower = bits[bits >> 16 == cut.bits] & (HALF - 1)
                self._counts[number] += torch.bincount(lower, minlength=HALF)
            elif round == 2 and cut.bits >= 0 and cut.last == NEVER:
                equal = (bits == cut.bits).nonzero()[:, 0]
                if cut.met + len(equal) >= cut.rest > 0:
                    cut.last = place.offset + int(equal[cut.rest - cut.met - 1])
                cut.met += len(equal)
        self._seen += scores[0].numel() if scores else 0
        if self.scope == "tensor" and self._seen == place.shape.numel():
            self._settle(round, place.name)

    def close(self, round: int) -> None:
        """A round is over."""
        if self.scope == "model":
            self._settle(round, "")

    def mask(self, place: Place, number: int, score: Tensor) -> Tensor:
        """Which entries of these rows are kept, bool. Right as soon as they were seen in the last round."""
        cut, bits = self._cut(number, place), pattern(score)
        kept = bits >= cut.bits
        late = max(0, cut.last + 1 - place.offset)  # of the equal ones from here on, none is kept
        if late < bits.numel():
            kept[late:] = bits[late:] > cut.bits
        return kept.reshape(score.shape)

    def _cut(self, number: int, place: Place) -> Cut:
        return self._cuts[number].setdefault("" if self.scope == "model" else place.name, Cut())

    def _settle(self, round: int, scope: str) -> None:
        self._seen = 0
        for number, cuts in enumerate(self._cuts):
            cut = cuts.setdefault(scope, Cut())
            if round == 0:
                keep = math.floor(cut.wanted)
                if keep >= cut.size:
                    continue
                if keep == 0:
                    cut.bits = 2**31 - 1  # above every number
                    continue
                cut.bits, cut.rest = _nth_largest(self._counts[number], keep)
            elif round == 1 and cut.rest:
                low, cut.rest = _nth_largest(self._counts[number], cut.rest)
                cut.bits = cut.bits << 16 | low
        self._counts.zero_()


def share(density: float) -> Fraction:
    """The simple fraction that is meant: 0.29 of 100 are 29 and 1 / 3 of 3 is 1, where floating-point products are below."""
    return Fraction(density).limit_denominator(10**9)


def pattern(score: Tensor) -> Tensor:
    """The bits of |score| as float32, flat, int32: what cannot be told apart there counts as equal."""
    return score.abs().to(torch.float32).reshape(-1).contiguous().view(torch.int32)


def _nth_largest(counts: Tensor, n: int) -> tuple[int, int]:
    """The bin of the n-th largest, and the how-manieth of that bin it is."""
    above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(above, n))
    return HALF - 1 - place, n - (int(above[place - 1]) if place else 0)


def _check(place: Place, number: int, score: Tensor, density: float) -> None:
    if not 0 <= density <= 1:
        raise ValueError(f"density={density} at {place.name!r}: must be from 0 to 1")
    if bool(torch.isnan(score).any()):
        raise CheckpointError(
            f"NaN in model {number} or in its base",
            tensor=place.name,
            cure="the largest entries cannot be chosen; mend or leave out that model",
        )
