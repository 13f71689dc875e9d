"""Which hyper-parameters a trial gets: a function of (seed, method, number), and for the last trials of what was best so far.

So a resumed, a parallel and a sequential study draw the same trials, and one method under two names gets the same ones twice.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from poise.catalog import Method, Space
from poise.compare.entries import Entry, as_entry

Side = Literal["low", "high"]
EDGE = 0.05  # share of a range, in the scale it is drawn on, that counts as its edge
WIDER = (0.25, 0.5)  # a range is widened from this share of it inside its edge to this share outside
NO_EDGE = {("weight_decay", "low")}  # below it there is only no decay, which the least of the range already is
NEAR = 1 / 3  # the share in which the second best must lie, for the best to be taken for the end of a trend
RESERVE = 4  # one trial in so many waits to see whether the best of the others lies at an edge


def draw(entry: Entry | Method, seed: int, number: int) -> dict[str, Any]:
    """The hyper-parameters of trial `number`.

    Trial 0 is the method's own default wherever that lies inside the space: tuning may never lose to not tuning. The others are
    points of a Kronecker sequence, u_n = frac(shift + n * alpha): with few trials, independent draws would leave one method's
    learning rates in a heap and spread another's by luck alone. `alpha` holds the powers of 1/g with g^(d+1) = g + 1 in d
    dimensions, which generalise the golden ratio; `shift` is a hash of (seed, method, hyper-parameter).
    """
    if number < 0:
        raise ValueError(f"number={number}: trials are numbered from 0")
    entry = as_entry(entry)
    known = defaults(entry.method) if number == 0 else {}
    chosen = {}
    for (name, space), alpha in zip(entry.space.items(), steps(len(entry.space)), strict=True):
        if name in known and inside(space, known[name]):
            chosen[name] = known[name]
        else:
            chosen[name] = place(space, (shift(seed, entry.method.name, name) + number * alpha) % 1.0)
    return chosen


def reserved(trials: int) -> int:
    """How many of a method's trials wait until the best of the others is known."""
    return trials // RESERVE


def widen(space: Mapping[str, Space], best: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Space]:
    """Wider ranges for the hyper-parameters whose best value lies at an edge, with the second best near it; {} if none does.

    The second trial tells a trend from an accident: one draw in ten lies at an edge of a range that hardly matters. Only
    logarithmic ranges are widened: those of rates and decays have no end of their own, while a momentum cannot pass 1. The new
    range begins well inside the old one and leaves it by half of its length, in the scale it is drawn on.
    """
    wider = {}
    for name, value in best.items():
        old = space[name]
        if old.kind != "log_uniform" or (side := edge(old, value)) is None or (name, side) in NO_EDGE:
            continue
        if edge(old, second[name], NEAR) == side:
            span = old.high / old.low
            if side == "high":
                wider[name] = Space("log_uniform", old.high * span ** -WIDER[0], old.high * span ** WIDER[1])
            else:
                wider[name] = Space("log_uniform", old.low * span ** -WIDER[1], old.low * span ** WIDER[0])
    return wider


def draw_wider(entry: Entry, wider: Mapping[str, Space], best: Mapping[str, Any], seed: int, number: int) -> dict[str, Any]:
    """The best hyper-parameters so far, with those at an edge drawn anew from the wider ranges."""
    return {**best, **draw(Entry(replace(entry.method, tune=dict(wider))), seed, number)}


def union(space: Space, wider: Space | None) -> Space:
    """The range that both cover."""
    return space if wider is None else replace(space, low=min(space.low, wider.low), high=max(space.high, wider.high))


def steps(dimensions: int) -> list[float]:
    """The sequence's step along each axis."""
    g = 1.5
    for _ in range(64):  # the map contracts: far below rounding after this many
        g = (1.0 + g) ** (1.0 / (dimensions + 1))
    return [g ** -(axis + 1) for axis in range(dimensions)]


def shift(seed: int, method: str, name: str) -> float:
    """Where the sequence starts along one axis, in [0, 1)."""
    digest = hashlib.sha256(f"{seed}\0{method}\0{name}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def place(space: Space, u: float) -> Any:
    """The value of `space` at u in [0, 1), in three digits: a number that a person can type again."""
    if space.kind == "choice":
        return space.options[int(u * len(space.options))]
    if space.kind == "log_uniform":
        value = space.low * (space.high / space.low) ** u
    else:
        value = space.low + (space.high - space.low) * u
    return min(max(float(f"{value:.3g}"), space.low), space.high)


def inside(space: Space, value: Any) -> bool:
    """Whether `space` could have drawn `value`."""
    if space.kind == "choice":
        return value in space.options
    return isinstance(value, int | float) and space.low <= value <= space.high


def edge(space: Space, value: Any, share: float = EDGE) -> Side | None:
    """At which end of `space`, in its outer `share`, a value lies, if at one: the optimum may then lie outside."""
    if space.kind == "choice":
        return None
    low, high, at = float(space.low), float(space.high), float(value)
    if space.kind == "log_uniform":
        low, high, at = math.log(low), math.log(high), math.log(at)
    part = (at - low) / (high - low)
    return "low" if part < share else "high" if part > 1 - share else None


def defaults(method: Method) -> Mapping[str, Any]:
    """The hyper-parameters that the method's signature gives a value to."""
    parameters = inspect.signature(method.target).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
