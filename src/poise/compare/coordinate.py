"""One hyper-parameter after another: each is swept with the others at the best so far.

A sweep is a round: its trials wait for those of the rounds before and not for each other. So a trial hangs on (seed, method,
number) and on finished trials of lower numbers alone, and a resumed, a parallel and a sequential study are the same study.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from poise.compare.entries import Entry
from poise.compare.sampler import place, shift

SWEEP = 3  # trials of a sweep; the best so far is a further point of it
GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples lie evenly in [0, 1) however many are taken


def least(entry: Entry) -> int:
    """Trials with which every hyper-parameter is swept once."""
    return 1 + SWEEP * len(entry.space)


def numbers(number: int, trials: int) -> range:
    """Numbers of the trials of a round, counted from 0, of a method that gets so many in all. Trial 0 is before all rounds."""
    return range(min(1 + number * SWEEP, trials), min(1 + (number + 1) * SWEEP, trials))


def draw(entry: Entry, best: Mapping[str, Any], seed: int, number: int) -> dict[str, Any]:
    """The best hyper-parameters so far, with the one that is swept drawn anew; after the last comes the first again.

    A range is cut by the golden ratio from a start that a hash of (seed, method, hyper-parameter) gives, so that later sweeps
    fall between the values of earlier ones. Of a choice the options take turns, without the one that is the best so far.
    """
    at, turn = divmod(number - 1, SWEEP)
    again, which = divmod(at, len(entry.space))
    name = list(entry.space)[which]
    space, count = entry.space[name], again * SWEEP + turn
    if space.kind == "choice":
        others = [option for option in space.options if option != best[name]] or list(space.options)
        return {**best, name: others[count % len(others)]}
    return {**best, name: place(space, (shift(seed, entry.method.name, name) + (count + 1) * GOLDEN) % 1.0)}
