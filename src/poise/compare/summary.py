"""From finished runs to results: intervals, differences, speed-ups, the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from poise.catalog import Space
from poise.compare import sampler
from poise.compare.entries import Entry
from poise.compare.results import BudgetPoint, MethodResult, Results, Run, Settings, Speedup, Timing, Verdict
from poise.compare.speedup import speedup
from poise.compare.statistics import Losses, gap, interval, paired, verdict
from poise.compare.tasks import Task


@dataclass
class Found:
    """What a study has found so far, by entry."""

    trials: dict[str, list[Run]]
    widened: dict[str, dict[str, Space]] = field(default_factory=dict)
    best: dict[str, int | None] = field(default_factory=dict)
    finals: dict[str, list[Run]] = field(default_factory=dict)
    budgets: dict[int, tuple[dict[str, Any], list[Run]]] = field(default_factory=dict)  # the reference's, by passes
    timing: dict[str, Timing] = field(default_factory=dict)


def summary(
    task: Task, entries: Mapping[str, Entry], settings: Settings, found: Found, reference: str, environment: dict[str, Any]
) -> Results:
    """All that was found, weighed."""
    losses: dict[str, Losses] = {name: final_losses(found.finals[name], settings) for name in entries}
    gaps = {name: gap(found.trials[name]) for name in entries}
    decision = verdict(losses, gaps)
    budgets = reference_budgets(found, reference, settings)
    rows = []
    for name, entry in entries.items():
        number, wider = found.best[name], found.widened[name]
        hyper = {} if number is None else found.trials[name][number].hyper
        edges: dict[str, sampler.Side] = {}
        for key, value in hyper.items():
            side = sampler.edge(sampler.union(entry.space[key], wider.get(key)), value)
            if side is not None and (key, side) not in sampler.NO_EDGE:
                edges[key] = side
        rows.append(
            MethodResult(
                name=name,
                method=entry.method.name,
                arxiv=entry.method.paper.arxiv,
                fixed=dict(entry.fixed),
                space={key: asdict(space) for key, space in entry.space.items()},
                widened={key: asdict(space) for key, space in wider.items()},
                trials=found.trials[name],
                best=number,
                edges=edges,
                tuning_gap=gaps[name],
                finals=found.finals[name],
                final=interval(losses[name]),
                to_best=paired(losses[name], losses[decision.ranking[0]]) if decision.ranking else None,
                to_reference=paired(losses[name], losses[reference]),
                speedup=speedup_of(losses[name], settings, budgets, getattr(task, "optimum", None)),
                timing=found.timing.get(name),
                divergences=sum(run.diverged for run in [*found.trials[name], *found.finals[name]]),
            )
        )
    return Results(
        task=task.name,
        unit=task.unit,
        fingerprint=task.fingerprint,
        optimum=getattr(task, "optimum", None),
        settings=settings,
        reference=reference,
        budgets=budgets,
        methods=rows,
        verdict=Verdict(halfway=halfway(found.finals, decision.ranking), **decision._asdict()),
        environment=environment,
    )


def final_losses(runs: Sequence[Run], settings: Settings) -> Losses:
    """By seed; None where the run diverged, everywhere if none was made."""
    return [None if run.diverged else run.loss for run in runs] or [None] * settings.seeds


def reference_budgets(found: Found, reference: str, settings: Settings) -> list[BudgetPoint]:
    """The reference at every budget, ascending."""
    best = found.best[reference]
    if best is None or not found.budgets:
        return []
    known = {**found.budgets, settings.steps: (found.trials[reference][best].hyper, found.finals[reference])}
    return [
        BudgetPoint(passes=passes, hyper=hyper, runs=runs, loss=interval(final_losses(runs, settings)))
        for passes, (hyper, runs) in sorted(known.items())
    ]


def speedup_of(losses: Losses, settings: Settings, budgets: Sequence[BudgetPoint], optimum: float | None) -> Speedup | None:
    known = [loss for loss in losses if loss is not None]
    curve = [
        (point.passes, [run.loss for run in point.runs if run.loss is not None]) for point in budgets if point.loss is not None
    ]
    return speedup(known, settings.steps, curve, optimum) if len(known) == len(losses) else None


def halfway(finals: Mapping[str, Sequence[Run]], names: Sequence[str]) -> list[str]:
    """`names` by mean training loss in the middle of the final runs."""

    def middle(run: Run) -> float:
        return min(run.curve, key=lambda point: abs(point[0] - run.passes / 2))[1]

    return sorted(names, key=lambda name: fmean(middle(run) for run in finals[name]))
