"""How sure a comparison is: intervals over paired seeds, what tuning owes to luck, and a verdict that calls a tie a tie."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from scipy.special import stdtrit

from poise.compare.digits import half, number
from poise.compare.results import Interval, Run

CONFIDENCE = 0.95

Losses = Sequence[float | None]  # one per seed; None: the run diverged


def interval(values: Losses) -> Interval | None:
    """Mean of n values with mean -+ t_(n-1) s / sqrt(n). None if a value is missing; one value alone has no bounds."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    mean = fmean(known)
    if len(known) == 1:
        return Interval(mean=mean, low=None, high=None)
    half = float(stdtrit(len(known) - 1, 0.5 + CONFIDENCE / 2)) * stdev(known) / math.sqrt(len(known))
    return Interval(mean=mean, low=mean - half, high=mean + half)


def paired(ours: Losses, theirs: Losses) -> Interval | None:
    """Interval of ours minus theirs, seed by seed: what the seeds share (data order, initial weights) cancels.

    Raises:
        ValueError: if there are not as many of ours as of theirs.
    """
    pairs = zip(ours, theirs, strict=True)
    return interval([a - b if a is not None and b is not None else None for a, b in pairs])


def gap(trials: Sequence[Run]) -> float | None:
    """How far the second-lowest loss among a method's trials is above the lowest; None with fewer than two.

    About as much may be luck in the draws: were losses near the best spread as those of two hyper-parameters around a smooth
    optimum, this gap would have the same distribution as the distance from the best trial to that optimum.
    """
    losses = sorted(run.loss for run in trials if run.loss is not None and not run.diverged)
    return losses[1] - losses[0] if len(losses) > 1 else None


class Decision(NamedTuple):
    """A verdict without what the middle of the runs would have said."""

    ranking: list[str]
    leaders: list[str]
    sentence: str


def verdict(losses: Mapping[str, Losses], gaps: Mapping[str, float | None] | None = None) -> Decision:
    """Who wins, if anyone: the lowest mean ties with every method that seeds or luck in tuning could have put in its place.

    A method that diverged on any seed is out of the ranking.

    Args:
        gaps: of every method, as `gap` gives them; one that is missing or None counts as 0.
    """
    gaps = gaps or {}
    means = {name: found.mean for name, values in losses.items() if (found := interval(values)) is not None}
    ranking = sorted(means, key=means.__getitem__)
    if not ranking:
        return Decision([], [], "no verdict: every method diverged on at least one seed")
    best = ranking[0]
    leaders = [
        name
        for name in ranking
        if name == best or may_be_luck(paired(losses[name], losses[best]), gaps.get(name), gaps.get(best))
    ]
    return Decision(ranking, leaders, sentence(losses, ranking, leaders))


def may_be_luck(difference: Interval | None, *gaps: float | None) -> bool:
    """Whether seeds, or other draws of the two methods' trials, could have made the difference.

    A single pair always leaves room for that.
    """
    unsure = None if difference is None else unsure_by(difference, *gaps)
    return difference is None or unsure is None or abs(difference.mean) <= unsure


def unsure_by(difference: Interval, *gaps: float | None) -> float | None:
    """The largest difference that would still be a tie; None for a single pair.

    The half width of the interval and the two gaps are independent, so they add by their squares.
    """
    seeds = half(difference)
    return None if seeds is None else math.hypot(seeds, *(found or 0.0 for found in gaps))


def sentence(losses: Mapping[str, Losses], ranking: list[str], leaders: list[str]) -> str:
    """The verdict in words."""
    best, seeds = ranking[0], len(losses[ranking[0]])
    mean = interval(losses[best])
    assert mean is not None
    at = number(mean.mean, half(mean))
    if len(leaders) > 1:
        if seeds == 1:
            why = "one seed tells nothing"
        elif all(may_be_luck(paired(losses[name], losses[best])) for name in leaders):
            why = f"paired differences over {seeds} seeds may be 0 at {CONFIDENCE:.0%}"
        else:
            why = f"{seeds} paired seeds tell them apart at {CONFIDENCE:.0%}, but other draws in tuning might not"
        return f"{' and '.join([', '.join(leaders[:-1]), leaders[-1]])} tie; the lowest is {at} ({why})"
    if len(losses) == 1:
        return f"{best} reaches {at}; there was nothing to compare it with"
    if len(ranking) == 1:
        return f"{best} wins at {at}: every other method diverged on at least one seed"
    gap = paired(losses[ranking[1]], losses[best])
    assert gap is not None and gap.low is not None and gap.high is not None
    below, low, high = (number(value, half(gap)) for value in (gap.mean, gap.low, gap.high))
    return f"{best} wins at {at}: {below} below {ranking[1]} ({CONFIDENCE:.0%} interval {low} to {high}, {seeds} paired seeds)"
