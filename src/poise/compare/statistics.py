"""How sure a comparison is: t intervals over paired seeds, and a verdict that calls a tie a tie."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from scipy.special import stdtrit

from poise.compare.results import Interval, Verdict

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


def verdict(losses: Mapping[str, Losses]) -> Verdict:
    """Who wins, if anyone: the lowest mean ties with every method whose paired difference to it may be 0.

    A method that diverged on any seed is out of the ranking.
    """
    means = {name: found.mean for name, values in losses.items() if (found := interval(values)) is not None}
    ranking = sorted(means, key=means.__getitem__)
    if not ranking:
        return Verdict(ranking=[], leaders=[], sentence="no verdict: every method diverged on at least one seed")
    best = ranking[0]
    leaders = [name for name in ranking if name == best or may_be_zero(paired(losses[name], losses[best]))]
    return Verdict(ranking=ranking, leaders=leaders, sentence=sentence(losses, ranking, leaders))


def may_be_zero(difference: Interval | None) -> bool:
    """Whether the data leave room for no difference; a single pair always does."""
    if difference is None or difference.low is None or difference.high is None:
        return True
    return difference.low <= 0.0 <= difference.high


def sentence(losses: Mapping[str, Losses], ranking: list[str], leaders: list[str]) -> str:
    """The verdict in words."""
    best, seeds = ranking[0], len(losses[ranking[0]])
    mean = interval(losses[best])
    assert mean is not None
    if len(leaders) > 1:
        why = "one seed tells nothing" if seeds == 1 else f"paired differences over {seeds} seeds may be 0 at {CONFIDENCE:.0%}"
        return f"{' and '.join([', '.join(leaders[:-1]), leaders[-1]])} tie at {mean.mean:.4f} ({why})"
    if len(losses) == 1:
        return f"{best} reaches {mean.mean:.4f}; there was nothing to compare it with"
    if len(ranking) == 1:
        return f"{best} wins at {mean.mean:.4f}: every other method diverged on at least one seed"
    gap = paired(losses[ranking[1]], losses[best])
    assert gap is not None and gap.low is not None and gap.high is not None
    return (
        f"{best} wins at {mean.mean:.4f}: {gap.mean:.4f} below {ranking[1]} "
        f"({CONFIDENCE:.0%} interval {gap.low:.4f} to {gap.high:.4f}, {seeds} paired seeds)"
    )
