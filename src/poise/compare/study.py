"""The protocol: equal tuning on one split, then paired seeds to the end of the schedule, weighed on another split.

1. Every method gets the same number of trials. The last of them wait for the others: where the best so far lies at an edge of
   its space they look beyond that edge, so that widening costs trials that count.
2. The trial with the lowest loss on `tune` is the method's choice, and is run again on seeds no trial has seen.
3. The reference is finished at further budgets too, each with the better of its two best trials, for the speed-ups.
4. Seconds are measured last, apart from all runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from poise.catalog import Method, Space
from poise.compare import coordinate, provenance, sampler
from poise.compare.entries import Entry, as_entry
from poise.compare.journal import Job, Journal
from poise.compare.plan import CANDIDATES, check, check_trials, choose, further_budgets, ranked, reference_of, trials_of
from poise.compare.results import Results, Run, Settings
from poise.compare.summary import Found, summary
from poise.compare.tasks import Split, Task
from poise.compare.timing import time_steps
from poise.compare.workers import Inline, Watch, Workers

SEEDS_APART = 10_000  # between two studies, so that neighbours share no run


class Nobody:
    """Nobody looks on."""

    def begin(self, what: str) -> None: ...
    def advance(self, passes: int) -> None: ...
    def drop(self, passes: int) -> None: ...


def compare(
    task: Task,
    methods: Mapping[str, Entry | Method],
    settings: Settings,
    journal: Journal,
    watch: Watch | None = None,
    *,
    workers: Workers | None = None,
    timing: bool = True,
) -> Results:
    """Weigh `methods` on `task`.

    Args:
        methods: what is compared, by the name it is shown under. One method may stand there under two names, which must tie.
        journal: where finished runs are kept; what it already holds is not run again.
        workers: where runs are made; by default here, one after another. It changes nothing but how long that takes.
        timing: whether to measure seconds per step.

    Raises:
        ValueError: if `methods` is empty or names something that does not train.
    """
    entries = {name: as_entry(entry) for name, entry in methods.items()}
    check(entries)
    check_trials(entries, settings)
    study = Study(task, entries, settings, journal, watch or Nobody(), workers or Inline(task, entries))
    found = Found(study.tune())
    study.choose(found)
    study.finish(found)
    study.other_budgets(found)
    if timing:
        study.watch.begin("seconds per step")
        chosen = {name: found.trials[name][best].hyper for name, best in found.best.items() if best is not None}
        seed = settings.seed * SEEDS_APART
        found.timing = time_steps(task, entries, chosen, reference_of(entries), seed=seed, device=settings.device)
    return summary(task, entries, settings, found, reference_of(entries), provenance.environment())


@dataclass(frozen=True)
class Study:
    """One comparison's runs, made or taken from the journal."""

    task: Task
    entries: Mapping[str, Entry]
    settings: Settings
    journal: Journal
    watch: Watch
    workers: Workers
    spaces: dict[str, dict[str, Space]] = field(default_factory=dict)  # what the journal is told a value was drawn from

    # -- the phases ---------------------------------------------------------------------------------------------------

    def tune(self) -> dict[str, list[Run]]:
        """The trials that wait for nothing, of all methods; all trials, where hyper-parameters are swept one after another."""
        if self.settings.sampler == "coordinate":
            return self.sweep()
        wanted = []
        for number in range(self.settings.trials):
            for name, entry in self.entries.items():
                if number < trials_of(entry, self.settings) - self.reserved(entry):
                    hyper = sampler.draw(entry, self.settings.seed, number)
                    wanted.append(self.trial(name, hyper, number, self.settings.tune_steps))
        return self.by_entry(wanted)

    def sweep(self) -> dict[str, list[Run]]:
        """The methods' defaults, then round after round; those of all methods are made together."""
        seed, at = self.settings.seed, self.settings.tune_steps
        found = self.by_entry([self.trial(name, sampler.draw(entry, seed, 0), 0, at) for name, entry in self.entries.items()])
        for number in range(self.settings.trials):
            wanted = []
            for name, entry in self.entries.items():
                best = found[name][choose(found[name]) or 0].hyper
                for trial in coordinate.numbers(number, trials_of(entry, self.settings)):
                    wanted += [self.trial(name, coordinate.draw(entry, best, seed, trial), trial, at)]
            for name, runs in self.by_entry(wanted).items():
                found[name] += runs
        return found

    def choose(self, found: Found) -> None:
        """The reserved trials, then every method's best."""
        wanted = []
        for name, entry in self.entries.items():
            two = [found.trials[name][number].hyper for number in ranked(found.trials[name])[:2]]
            hyper = two[0] if two else {}
            wider = sampler.widen(entry.space, *two) if self.reserved(entry) and len(two) == 2 else {}
            found.widened[name] = wider
            self.spaces[name] = {key: sampler.union(space, wider.get(key)) for key, space in entry.space.items()}
            for number in range(len(found.trials[name]), trials_of(entry, self.settings)):
                if wider:
                    drawn = sampler.draw_wider(entry, wider, hyper, self.settings.seed, number)
                else:
                    drawn = sampler.draw(entry, self.settings.seed, number)
                wanted.append(self.trial(name, drawn, number, self.settings.tune_steps))
        for name, runs in self.by_entry(wanted).items():
            found.trials[name] += runs
        found.best = {name: choose(runs) for name, runs in found.trials.items()}

    def finish(self, found: Found) -> None:
        """Every method's choice on all seeds."""
        wanted = []
        for number in range(self.settings.seeds):
            for name, best in found.best.items():
                if best is None:
                    self.watch.drop(self.settings.steps)
                else:
                    wanted.append(self.final(name, found.trials[name][best].hyper, number, self.settings.steps))
        found.finals = self.by_entry(wanted)

    def other_budgets(self, found: Found) -> None:
        """The reference at every further budget: its best trials compete there, the better is run on all seeds."""
        name = reference_of(self.entries)
        passes = further_budgets(self.entries, self.settings)
        best = ranked(found.trials[name])[:CANDIDATES]
        expected = min(CANDIDATES, trials_of(self.entries[name], self.settings))
        competing = best if len(best) > 1 else []
        self.watch.drop(
            sum(passes) * ((expected if expected > 1 else 0) - len(competing) + (0 if best else self.settings.seeds))
        )
        if not best:
            return
        hyper = {number: found.trials[name][number].hyper for number in best}
        tried = iter(self.runs([self.trial(name, hyper[number], number, at) for at in passes for number in competing]))
        chosen = {}
        for at in passes:
            better = choose([next(tried) for _ in competing])
            chosen[at] = hyper[better if better is not None else best[0]]
        wanted = [self.final(name, chosen[at], number, at) for at in passes for number in range(self.settings.seeds)]
        runs = iter(self.runs(wanted))
        found.budgets = {at: (chosen[at], [next(runs) for _ in range(self.settings.seeds)]) for at in passes}

    # -- single runs --------------------------------------------------------------------------------------------------

    def reserved(self, entry: Entry) -> int:
        return 0 if self.settings.sampler == "coordinate" else sampler.reserved(trials_of(entry, self.settings))

    def trial(self, name: str, hyper: Mapping[str, Any], number: int, passes: int) -> Job:
        return self.job(name, hyper, number, self.settings.seed * SEEDS_APART, passes, "tune")

    def final(self, name: str, hyper: Mapping[str, Any], number: int, passes: int) -> Job:
        return self.job(name, hyper, number, self.settings.seed * SEEDS_APART + 1 + number, passes, "report")

    def job(self, name: str, hyper: Mapping[str, Any], number: int, seed: int, passes: int, split: Split) -> Job:
        entry, task = self.entries[name], self.task
        code = provenance.code(entry.method)
        threads, device = self.settings.threads, self.settings.device
        return Job(
            task.name, task.fingerprint, code, name, entry.method.name, entry.fixed, hyper, number, seed, passes, split,
            threads, device,
        )  # fmt: skip

    def by_entry(self, jobs: Sequence[Job]) -> dict[str, list[Run]]:
        """The runs of `jobs`, in their order, by entry."""
        found: dict[str, list[Run]] = {name: [] for name in self.entries}
        for job, run in zip(jobs, self.runs(jobs), strict=True):
            found[job.entry].append(run)
        return found

    def runs(self, jobs: Sequence[Job]) -> list[Run]:
        """The runs of `jobs`, from the journal where it has them; what is made is written down as soon as it is finished."""
        found = [self.journal.find(job) for job in jobs]
        self.watch.drop(sum(job.passes for job, run in zip(jobs, found, strict=True) if run is not None))
        missing = [place for place, run in enumerate(found) if run is None]
        for which, run in self.workers.run([jobs[place] for place in missing], self.watch):
            job = jobs[missing[which]]
            self.journal.add(job, run, self.spaces.get(job.entry, self.entries[job.entry].space))
            self.watch.drop(job.passes - run.passes)
            found[missing[which]] = run
        return [run for run in found if run is not None]
