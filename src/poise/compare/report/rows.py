"""The rows of a report's table, and the small drawing of a difference in them."""

from __future__ import annotations

from typing import Any, NamedTuple

from poise.compare.digits import number, ratio, setting, spread
from poise.compare.results import Interval, MethodResult, Results, Speedup, Timing
from poise.compare.table import some_train_less, trains

from .charts import state_bytes
from .looks import Look, looks


class Setting(NamedTuple):
    """One hyper-parameter of the choice."""

    name: str
    value: str
    edge: str | None  # the end of its range at which it lies
    fixed: bool  # set by the user, and not tuned


class Strip(NamedTuple):
    """A difference drawn on a line that all rows share: places in percent of its width."""

    zero: float
    mean: float
    low: float
    high: float


class Row(NamedTuple):
    """One entry of the comparison, as the table says it."""

    name: str
    method: str
    arxiv: str | None
    look: Look
    leads: bool
    reference: bool
    trains: str  # parameters; "" where every entry trains all of them
    final: str
    difference: str
    strip: Strip | None
    speedup: str
    speedup_interval: str
    state: str
    time_ratio: str
    time: str
    settings: list[Setting]
    diverged: str


def rows(results: Results) -> list[Row]:
    """Every entry, the lowest final loss first, those without one last."""
    ordered = sorted(results.methods, key=lambda found: found.final.mean if found.final else float("inf"))
    drawn = strips({found.name: found.to_reference for found in ordered if found.name != results.reference})
    seen = looks(results)
    return [row(results, found, seen[found.name], drawn.get(found.name)) for found in ordered]


def row(results: Results, found: MethodResult, look: Look, strip: Strip | None) -> Row:
    reference = found.name == results.reference
    return Row(
        name=found.name,
        method=found.method,
        arxiv=found.arxiv,
        look=look,
        leads=found.name in results.verdict.leaders,
        reference=reference,
        trains=trains(found) if some_train_less(results) else "",
        final=spread(found.final),
        difference="" if reference or found.to_reference is None else spread(found.to_reference, sign="+"),
        strip=strip,
        speedup="" if reference or found.speedup is None else ratio(found.speedup),
        speedup_interval="" if reference else between(found.speedup),
        state=number(state_bytes(found)) if found.finals or found.trials else "",
        time_ratio="" if found.timing is None else f"{found.timing.ratio:.2f}×",
        time=milliseconds(found.timing),
        settings=choice(found),
        diverged=f"{found.divergences} of {len(found.trials) + len(found.finals)}",
    )


def between(value: Speedup | None) -> str:
    """A speed-up's interval."""
    return "" if value is None else f"{value.low:.2f} to {value.high:.2f}"


def milliseconds(value: Timing | None) -> str:
    """A step's time, and what of it lies outside the forward and backward passes."""
    if value is None:
        return ""
    return f"{1e3 * value.seconds_per_step:.3g} ms, update {1e3 * value.optimizer_seconds_per_step:.3g}"


def choice(found: MethodResult) -> list[Setting]:
    """The chosen trial's hyper-parameters, and those the user set."""
    hyper: dict[str, Any] = next((run.hyper for run in found.trials if run.number == found.best), {})
    tuned = [Setting(name, setting(value), found.edges.get(name), False) for name, value in hyper.items()]
    return tuned + [Setting(name, setting(value), None, True) for name, value in found.fixed.items() if name not in hyper]


def strips(differences: dict[str, Interval | None]) -> dict[str, Strip]:
    """Differences with bounds, zero included, on one scale."""
    known = {n: (d.mean, d.low, d.high) for n, d in differences.items() if d and d.low is not None and d.high is not None}
    if not known:
        return {}
    low = min(0.0, *(bounds[1] for bounds in known.values()))
    high = max(0.0, *(bounds[2] for bounds in known.values()))
    width = (high - low) or 1.0

    def at(value: float) -> float:
        return round(4 + 92 * (value - low) / width, 2)

    return {name: Strip(at(0.0), *map(at, bounds)) for name, bounds in known.items()}
