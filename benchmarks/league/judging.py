"""Whether a difference that a paper reports shows in a comparison's own numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from poise.compare.digits import number, spread
from poise.compare.results import Interval, MethodResult, Results
from poise.compare.statistics import paired, unsure_by
from poise.compare.summary import final_losses

from .entries import PASSES_OF_A_STEP

Outcome = Literal["held", "not seen", "contradicted", "not judged"]


@dataclass(frozen=True)
class Finding:
    """What one task says of one claim."""

    outcome: Outcome
    why: str


Judge = Callable[[Results], Finding]


def lower(ours: str, theirs: str) -> Judge:
    """`ours` ends below `theirs` after equal passes."""

    def judge(results: Results) -> Finding:
        difference, unsure = between(results, ours, theirs)
        if difference is None:
            return Finding("not judged", "one of the two diverged on a seed")
        outcome = "not seen" if abs(difference.mean) <= unsure else "held" if difference.mean < 0 else "contradicted"
        return Finding(outcome, told(ours, theirs, difference, unsure))

    return judge


def level(ours: str, theirs: str) -> Judge:
    """`ours` ends no higher than `theirs`, as far as seeds and luck in tuning let one tell."""

    def judge(results: Results) -> Finding:
        difference, unsure = between(results, ours, theirs)
        if difference is None:
            return Finding("not judged", "one of the two diverged on a seed")
        return Finding("held" if difference.mean <= unsure else "contradicted", told(ours, theirs, difference, unsure))

    return judge


def less_state(ours: str, theirs: str, share: float) -> Judge:
    """The state of `ours` is at most so large a share of that of `theirs`."""

    def judge(results: Results) -> Finding:
        mine, other = (state(entry(results, name)) for name in (ours, theirs))
        return Finding(
            "held" if mine <= share * other else "contradicted", f"{number(mine)} against {number(other)} bytes a parameter"
        )

    return judge


def cheaper_step(ours: str, theirs: str) -> Judge:
    """The update of `ours`, without the passes, takes less time. What is less than a tenth is not told from noise."""

    def judge(results: Results) -> Finding:
        mine, other = entry(results, ours).timing, entry(results, theirs).timing
        if mine is None or other is None:
            return Finding("not judged", "not timed")
        ratio = mine.optimizer_seconds_per_step / other.optimizer_seconds_per_step
        outcome = "held" if ratio < 0.9 else "contradicted" if ratio > 1.1 else "not seen"
        return Finding(outcome, f"the update takes {ratio:.2f} of the time of {theirs}'s")

    return judge


def sooner(ours: str, theirs: str) -> Judge:
    """`ours` is further ahead of the reference in seconds than `theirs`."""

    def judge(results: Results) -> Finding:
        mine, other = (seconds_speedup(results, entry(results, name)) for name in (ours, theirs))
        if mine is None or other is None:
            return Finding("not judged", "no speed-up known")
        outcome = "held" if mine[1] > other[2] else "contradicted" if mine[2] < other[1] else "not seen"
        return Finding(outcome, f"{mine[0]:.2f} against {other[0]:.2f} times as fast as {results.reference} in seconds")

    return judge


def early_ranking_misleads(results: Results) -> Finding:
    """The ranking in the middle of the runs is not that at their end."""
    verdict = results.verdict
    places = {name: place for place, name in enumerate(verdict.ranking)}
    moved = [abs(places[name] - place) for place, name in enumerate(verdict.halfway)]
    why = f"{sum(map(bool, moved))} of {len(moved)} change places, by {fmean(moved):.1f} on average"
    return Finding("held" if any(moved) else "not seen", f"{why}; the leader of the middle is {verdict.halfway[0]}")


def entry(results: Results, name: str) -> MethodResult:
    """An entry by its name.

    Raises:
        ValueError: if it was not weighed.
    """
    found = next((found for found in results.methods if found.name == name), None)
    if found is None:
        raise ValueError(f"{results.task}: no entry {name!r}; run the league again")
    return found


def between(results: Results, ours: str, theirs: str) -> tuple[Interval | None, float]:
    """Paired difference of final losses, and the largest that would still be a tie."""
    mine, other = entry(results, ours), entry(results, theirs)
    losses = [final_losses(found.finals, results.settings) for found in (mine, other)]
    difference = paired(*losses)
    unsure = None if difference is None else unsure_by(difference, mine.tuning_gap, other.tuning_gap)
    return difference, float("inf") if unsure is None else unsure


def told(ours: str, theirs: str, difference: Interval, unsure: float) -> str:
    return f"{ours} minus {theirs}: {spread(difference, sign='+')}, a tie up to {number(unsure, unsure)}"


def state(found: MethodResult) -> float:
    """Bytes of optimizer state a parameter."""
    runs = found.finals or found.trials
    return fmean(run.state_bytes / run.parameters for run in runs)


def seconds_speedup(results: Results, found: MethodResult) -> tuple[float, float, float] | None:
    """Speed-up over the reference in seconds, with its interval: that in passes, over what a pass takes of the reference's."""
    if found.speedup is None or found.timing is None:
        return None
    per_pass = found.timing.ratio / PASSES_OF_A_STEP.get(found.name, 1)
    return found.speedup.ratio / per_pass, found.speedup.low / per_pass, found.speedup.high / per_pass
