"""What a comparison consists of, known before anything is run: who takes part, who is the reference, how many passes."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence

import torch

from poise.catalog import Method
from poise.compare import coordinate
from poise.compare.driven import AROUND
from poise.compare.entries import Entry, as_entry
from poise.compare.results import Run, Settings
from poise.compare.staged import ADAPTER
from poise.compare.tasks import Task
from poise.optim.options import Options

CANDIDATES = 2  # trials of the reference that compete at each further budget


def budget(methods: Mapping[str, Entry | Method], settings: Settings) -> int:
    """Forward and backward passes of the whole comparison; those of `timing` are not counted."""
    entries = {name: as_entry(entry) for name, entry in methods.items()}
    tuning = sum(trials_of(entry, settings) for entry in entries.values()) * settings.tune_steps
    candidates = min(CANDIDATES, trials_of(entries[reference_of(entries)], settings))
    further = sum(further_budgets(entries, settings)) * (settings.seeds + (candidates if candidates > 1 else 0))
    return tuning + len(entries) * settings.seeds * settings.steps + further


def trials_of(entry: Entry, settings: Settings) -> int:
    """Trials an entry gets: what has nothing to tune would run the same trial again and again."""
    return settings.trials if entry.space else 1


def further_budgets(entries: Mapping[str, Entry], settings: Settings) -> list[int]:
    """Passes of the reference's further budgets; alone, it has nobody to be a reference for."""
    passes = {max(1, round(times * settings.steps)) for times in settings.budgets} - {settings.steps}
    return sorted(passes) if len(entries) > 1 else []


def reference_of(entries: Mapping[str, Entry]) -> str:
    """The entry that others are measured against: the first AdamW with nothing fixed, else the first AdamW, else the first."""
    tests: tuple[Callable[[Entry], bool], ...] = (
        lambda entry: entry.method.name == "adamw" and not entry.fixed,
        lambda entry: entry.method.name == "adamw",
        lambda entry: True,
    )
    return next(name for test in tests for name, entry in entries.items() if test(entry))


def ranked(trials: Sequence[Run]) -> list[int]:
    """Numbers of the trials that did not diverge, lowest loss first, the first of equals before the others."""
    return [
        number for _, number in sorted((run.loss, run.number) for run in trials if run.loss is not None and not run.diverged)
    ]


def choose(trials: Sequence[Run]) -> int | None:
    """Number of the trial with the lowest loss; None if every one diverged."""
    return next(iter(ranked(trials)), None)


def check_trials(entries: Mapping[str, Entry], settings: Settings) -> None:
    """Raise ValueError if there are too few trials to sweep every hyper-parameter once, where they are swept one by one."""
    for name, entry in entries.items():
        if settings.sampler == "coordinate" and entry.space and settings.trials < (least := coordinate.least(entry)):
            raise ValueError(
                f"trials={settings.trials}: sampler 'coordinate' needs at least {least} to sweep each of {len(entry.space)} "
                f"hyper-parameters of {name!r} once"
            )


def check(entries: Mapping[str, Entry], task: Task | None = None) -> None:
    """Raise ValueError or TypeError for what cannot be compared; with a task, every entry's optimizer is built once."""
    if not entries:
        raise ValueError("methods: at least one is needed")
    for name, entry in entries.items():
        method = entry.method
        if method.kind != "optimizer":
            raise ValueError(f"methods: {name!r} is a {method.kind} of family {method.family}; only optimizers can be compared")
        if task is not None and entry.fixed:
            with torch.random.fork_rng(devices=[]):
                try:
                    entry.build(task.model(), task)
                except (ValueError, TypeError) as error:
                    said = f"methods: {name!r} cannot be built with {dict(entry.fixed)}: {error}{meant(entry)}"
                    raise ValueError(said) from error


def meant(entry: Entry) -> str:
    """What a user may have meant by a setting that nothing here has; empty if there is none such."""
    known = [*inspect.signature(entry.method.target).parameters, *Options.__annotations__, AROUND, ADAPTER]
    strange = next((name for name in entry.fixed if name not in known), None)
    near = difflib.get_close_matches(strange, known, n=1) if strange is not None else []
    return f"; did you mean {near[0]!r} by {strange!r}?" if near else ""
