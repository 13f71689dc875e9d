"""The protocol of a comparison.

1. Every method gets the same number of trials, each a finished schedule of the same length on one seed.
2. The trial with the lowest loss on the split `tune` is the method's choice.
3. The choice is run again on seeds that no trial has seen, paired across methods: run i of every method starts from the same
   weights and reads the same data in the same order, to the end of its schedule.
4. The score is the final loss on the split `report`, which chose nothing.

Trials and seeds go round all methods before the next number is begun, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Protocol

from poise.catalog import Method
from poise.compare import provenance, sampler
from poise.compare.journal import Job, Journal
from poise.compare.results import MethodResult, Results, Run, Settings
from poise.compare.statistics import interval, paired, verdict
from poise.compare.tasks import Split, Task
from poise.compare.train import train

SEEDS_APART = 10_000  # between two studies, so that neighbours share no run


class Watch(Protocol):
    """Who looks on while a comparison runs."""

    def begin(self, what: str) -> None:
        """A run begins."""

    def advance(self, passes: int) -> None:
        """So many forward and backward passes were taken."""

    def drop(self, passes: int) -> None:
        """So many passes will not be taken: the run was in the journal, or it diverged."""


class Nobody:
    """Nobody looks on."""

    def begin(self, what: str) -> None: ...
    def advance(self, passes: int) -> None: ...
    def drop(self, passes: int) -> None: ...


def compare(
    task: Task, methods: Mapping[str, Method], settings: Settings, journal: Journal, watch: Watch | None = None
) -> Results:
    """Weigh `methods` on `task`.

    Args:
        methods: what is compared, by the name it is shown under. One method may stand there under two names, which must tie.
        journal: where finished runs are kept; what it already holds is not run again.

    Raises:
        ValueError: if `methods` is empty or names something that does not train.
    """
    check(methods)
    study = Study(task, settings, journal, watch or Nobody())
    trials: dict[str, list[Run]] = {name: [] for name in methods}
    for number in range(settings.trials):
        for name, method in methods.items():
            if number < trials_of(method, settings):
                trials[name].append(study.trial(name, method, number))
    best = {name: choose(runs) for name, runs in trials.items()}
    finals: dict[str, list[Run]] = {name: [] for name in methods}
    for number in range(settings.seeds):
        for name, method in methods.items():
            chosen = best[name]
            if chosen is None:
                study.watch.drop(settings.steps)
            else:
                finals[name].append(study.final(name, method, trials[name][chosen].hyper, number))
    return summary(task, methods, settings, trials, best, finals)


def budget(methods: Mapping[str, Method], settings: Settings) -> int:
    """Forward and backward passes of the whole comparison."""
    tuning = sum(trials_of(method, settings) for method in methods.values()) * settings.tune_steps
    return tuning + len(methods) * settings.seeds * settings.steps


@dataclass(frozen=True)
class Study:
    """How one run of the comparison is made, or taken from the journal."""

    task: Task
    settings: Settings
    journal: Journal
    watch: Watch

    def trial(self, name: str, method: Method, number: int) -> Run:
        seed = self.settings.seed * SEEDS_APART
        hyper = sampler.draw(method, self.settings.seed, number)
        self.watch.begin(f"{name}: trial {number + 1} of {trials_of(method, self.settings)}")
        return self.run(self.job(name, method, hyper, number, seed, self.settings.tune_steps, "tune"), method)

    def final(self, name: str, method: Method, hyper: Mapping[str, object], number: int) -> Run:
        seed = self.settings.seed * SEEDS_APART + 1 + number
        self.watch.begin(f"{name}: seed {number + 1} of {self.settings.seeds}")
        return self.run(self.job(name, method, hyper, number, seed, self.settings.steps, "report"), method)

    def job(
        self, name: str, method: Method, hyper: Mapping[str, object], number: int, seed: int, passes: int, split: Split
    ) -> Job:
        code = provenance.code(method)
        return Job(self.task.name, self.task.fingerprint, code, name, method.name, hyper, number, seed, passes, split)

    def run(self, job: Job, method: Method) -> Run:
        found = self.journal.find(job)
        if found is None:
            found = train(
                self.task,
                method,
                dict(job.hyper),
                number=job.number,
                seed=job.seed,
                passes=job.passes,
                split=job.split,
                advance=self.watch.advance,
            )
            self.journal.add(job, found, method.tune)
            self.watch.drop(job.passes - found.passes)
        else:
            self.watch.drop(job.passes)
        return found


def trials_of(method: Method, settings: Settings) -> int:
    """Trials a method gets: what has nothing to tune would run the same trial again and again."""
    return settings.trials if method.tune else 1


def choose(trials: list[Run]) -> int | None:
    """Number of the trial with the lowest loss, the first of equals; None if every one diverged."""
    healthy = [(run.loss, run.number) for run in trials if run.loss is not None and not run.diverged]
    return min(healthy)[1] if healthy else None


def check(methods: Mapping[str, Method]) -> None:
    if not methods:
        raise ValueError("methods: at least one is needed")
    for name, method in methods.items():
        if method.kind != "optimizer":
            raise ValueError(f"methods: {name!r} is a {method.kind} of family {method.family}; only optimizers can be compared")


def summary(
    task: Task,
    methods: Mapping[str, Method],
    settings: Settings,
    trials: Mapping[str, list[Run]],
    best: Mapping[str, int | None],
    finals: Mapping[str, list[Run]],
) -> Results:
    """All that was found, weighed."""
    losses = {name: [run.loss for run in runs] or [None] * settings.seeds for name, runs in finals.items()}
    decision = verdict(losses)
    reference = next((name for name, method in methods.items() if method.name == "adamw"), next(iter(methods)))
    rows = []
    for name, method in methods.items():
        number = best[name]
        hyper = {} if number is None else trials[name][number].hyper
        edges: dict[str, sampler.Side] = {
            key: side for key, value in hyper.items() if (side := sampler.edge(method.tune[key], value))
        }
        rows.append(
            MethodResult(
                name=name,
                method=method.name,
                arxiv=method.paper.arxiv,
                space={key: asdict(space) for key, space in method.tune.items()},
                trials=trials[name],
                best=number,
                edges=edges,
                finals=finals[name],
                final=interval(losses[name]),
                to_best=paired(losses[name], losses[decision.ranking[0]]) if decision.ranking else None,
                to_reference=paired(losses[name], losses[reference]),
                divergences=sum(run.diverged for run in [*trials[name], *finals[name]]),
            )
        )
    return Results(
        task=task.name,
        unit=task.unit,
        fingerprint=task.fingerprint,
        settings=settings,
        reference=reference,
        methods=rows,
        verdict=decision,
        environment=provenance.environment(),
    )
