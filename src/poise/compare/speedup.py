"""Speed-up: how much of the reference's budget reaches the same final loss.

Reading off when a decaying curve of the reference crosses a line would compare a finished run with an unfinished one, and hands
a method that is compared with itself a gain of 1.1 to 1.3. So the reference is finished at several budgets, and the budget of
equal loss lies between two of those. The idea is that of Fantastic Pretraining Optimizers and Where to Find Them
(arXiv 2509.02046), with a line between finished runs where they fit a power law.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Literal

import numpy as np

from poise.compare.results import Speedup

Bound = Literal["exact", "at least", "at most"]
DRAWS = 2000
TINY = 1e-30  # a loss may reach the optimum, or pass it by rounding


def speedup(
    losses: Sequence[float],
    passes: int,
    curve: Sequence[tuple[int, Sequence[float]]],
    optimum: float | None = None,
    seed: int = 0,
) -> Speedup | None:
    """The reference's passes to the mean of `losses`, over `passes`; None without the reference at that budget and another.

    Args:
        losses: of the method, by seed.
        passes: of the method.
        curve: (passes, losses by seed) of the reference, ascending; the seeds are the method's, so they are drawn together.
        optimum: the lowest loss there is. Where it is known, what is left to it falls by orders of magnitude, so that lines
            are drawn over its logarithm.
    """
    if len(curve) < 2 or passes not in [at for at, _ in curve]:
        return None

    def level(values: Iterable[float]) -> float:
        return fmean(values) if optimum is None else math.log(max(fmean(values) - optimum, TINY))

    needed, bound = crossing([(at, level(found)) for at, found in curve], level(losses), passes)
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(DRAWS if len(losses) > 1 else 0):
        some = rng.integers(len(losses), size=len(losses))
        points = [(at, level(found[i] for i in some)) for at, found in curve]
        drawn.append(crossing(points, level(losses[i] for i in some), passes)[0] / passes)
    low, high = np.quantile(drawn, (0.025, 0.975)) if drawn else (needed / passes, needed / passes)
    return Speedup(passes=needed, ratio=needed / passes, low=float(low), high=float(high), bound=bound)


def crossing(points: Sequence[tuple[int, float]], loss: float, start: int) -> tuple[float, Bound]:
    """Where the curve through `points` (passes, loss) first reaches `loss`, with straight lines over the logarithm of passes.

    It is followed from `start`, the method's own budget, to more passes for a lower loss and to fewer for a higher one: a curve
    may rise by chance, and a lower loss than the reference's must still mean a speed-up above 1, an equal one exactly 1.
    Beyond the ends nothing is known: the end is returned, and that it is a bound.
    """
    own = next(i for i, (at, _) in enumerate(points) if at == start)
    if loss == points[own][1]:
        return float(start), "exact"
    lower = loss < points[own][1]
    way = points[own:] if lower else points[own::-1]
    for (at, above), (beyond, there) in pairwise(way):
        if (there <= loss) if lower else (there >= loss):
            part = (above - loss) / (above - there)
            return math.exp(math.log(at) + part * (math.log(beyond) - math.log(at))), "exact"
    return float(way[-1][0]), "at least" if lower else "at most"
