"""`poise compare`: the scale."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from poise.cli.exits import BROKEN, INTERRUPTED, bad_input, interruptible, stop
from poise.cli.methods import terminal_or_wide
from poise.cli.progress import Bar
from poise.cli.report import finished

if TYPE_CHECKING:
    from poise.compare.results import Settings

TASK = "An embedded task, or a FILE.py with model(), batches(split) and loss(model, batch)."
METHODS = "What to weigh, separated by commas; NAME=METHOD(lr=1e-3,state=int8) names an entry and fixes some of its settings."
FAMILY = "Weigh every method of this family that trains a model, beside AdamW on all of it: optim, training or adapt."
BUDGETS = "Further budgets at which the reference is finished, in units of --steps, for the speed-ups; none: ''."
SAMPLER = "joint: a trial's hyper-parameters are drawn together; coordinate: they are swept one after another, in more trials."
AT_ONCE = 8  # workers that are started unless asked for more: each holds a model of its own


def compare(
    task: Annotated[str | None, typer.Argument(help=TASK, show_default="code-lm")] = None,
    task_option: Annotated[str | None, typer.Option("--task", help="The same.", hidden=True)] = None,
    methods: Annotated[str | None, typer.Option(help=METHODS, show_default="adamw,lion,muon")] = None,
    family: Annotated[str | None, typer.Option(help=FAMILY)] = None,
    trials: Annotated[int, typer.Option(min=1, help="Tuning trials per method.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Forward and backward passes of a final run.")] = 300,
    tune_steps: Annotated[int | None, typer.Option(min=1, help="Those of a trial, by default as many.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Final runs per method, paired across methods.")] = 3,
    budgets: Annotated[str, typer.Option(help=BUDGETS)] = "0.5,2",
    sampler: Annotated[str, typer.Option(help=SAMPLER)] = "joint",
    out: Annotated[
        Path | None, typer.Option(help="Folder of results.json, report.html and the journal, by default runs/compare/TASK.")
    ] = None,
    against: Annotated[Path | None, typer.Option(help="Another results.json, to set beside this one.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the study.")] = 0,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda, cuda:1, mps, ...")] = "cpu",
    workers: Annotated[
        int | None,
        typer.Option(min=1, help=f"Runs at once; by default one for each core on a CPU, at most {AT_ONCE}, else one."),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of each run. Results hang on it, but not on --workers.")] = 1,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of going on from the journal.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON instead of a table.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Weigh methods against each other: equal tuning, paired seeds, finished schedules, and how sure the answer is.

    Killed at any point, the same command goes on where it stood.
    """
    from poise.compare import against as beside
    from poise.compare import plan, provenance, report, study, table, tasks
    from poise.compare.entries import of_family, parse
    from poise.compare.journal import Journal
    from poise.compare.results import Settings
    from poise.compare.workers import Inline, Pool, WorkerKilled

    with bad_input():
        if sampler not in ("joint", "coordinate"):
            raise ValueError(f"--sampler {sampler!r}: expected joint or coordinate")
        settings = Settings(
            sampler=sampler,
            trials=trials,
            tune_steps=tune_steps or steps,
            steps=steps,
            seeds=seeds,
            seed=seed,
            budgets=numbers(budgets),
            threads=threads,
            device=device_of(device),
        )
        entries = parse(",".join(filter(None, [methods, family and of_family(family)])) or "adamw,lion,muon")
        plan.check(entries)
        plan.check_trials(entries, settings)
        problem = tasks.load(one_task(task, task_option))
        plan.check(entries, problem)
        folder = out or Path("runs", "compare", problem.name)
        if fresh:
            (folder / "journal.db").unlink(missing_ok=True)
        other = None if against is None else finished(against)[1]
        if other is not None and (other.task, other.fingerprint) != (problem.name, problem.fingerprint):
            raise ValueError(f"--against {against}: {other.task} with other data than {problem.name} cannot be set beside it")
        journal = Journal(folder / "journal.db")
    if not quiet and (outdated := journal.outdated({provenance.code(entry.method) for entry in entries.values()})):
        typer.echo(f"poise: {outdated} finished runs in {folder} were made by other code and do not count", err=True)
    count = workers or default_workers(settings)
    pool = Pool(problem, entries, count) if count > 1 else None
    try:
        with interruptible(), pool or nullcontext(), Bar(plan.budget(entries, settings), quiet=quiet or as_json) as bar:
            results = study.compare(problem, entries, settings, journal, bar, workers=pool or Inline(problem, entries))
    except KeyboardInterrupt:
        kept = f"{len(journal.rows)} finished runs are kept in {folder}"
        raise stop(f"poise: interrupted; {kept}, the same command goes on from there", INTERRUPTED) from None
    except WorkerKilled as error:
        raise stop(f"poise: {error}", INTERRUPTED) from None
    results.write(folder / "results.json")
    report.write(results, folder / "report.html", other)
    if as_json:
        typer.echo(results.model_dump_json(indent=1))
    else:
        console = terminal_or_wide()
        console.print(table.render(results))
        if other is not None:
            console.print(beside.table(results, other))
        written = f"written: {folder / 'results.json'}, {folder / 'report.html'}"
        console.print(written, style="dim", highlight=False, markup=False)
    if not results.verdict.ranking:
        raise typer.Exit(BROKEN)


def one_task(argument: str | None, option: str | None) -> str:
    """The task, which may be given either way.

    Raises:
        ValueError: if it is given both ways.
    """
    if argument is not None and option is not None:
        raise ValueError(f"task {argument!r} and --task {option!r}: give one")
    return argument or option or "code-lm"


def numbers(text: str) -> tuple[float, ...]:
    """ "0.5,2" as numbers.

    Raises:
        ValueError: if one is none, or not above 0.
    """
    try:
        found = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        found = (0.0,)
    if not all(0 < number < float("inf") for number in found):
        raise ValueError(f"--budgets {text!r}: expected numbers above 0, separated by commas")
    return found


def device_of(name: str) -> str:
    """The device's own name.

    Raises:
        ValueError: if torch knows none of that name, or this machine has none.
    """
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return str(torch.device(name))


def default_workers(settings: Settings) -> int:
    """One for every core that this process may use: many small runs side by side use a CPU better than threads do."""
    if settings.device != "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // settings.threads, AT_ONCE))
