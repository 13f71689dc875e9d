"""`poise compare`: the scale."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from poise import catalog
from poise.cli.exits import BROKEN, INTERRUPTED, bad_input, interruptible, stop
from poise.cli.methods import terminal_or_wide
from poise.cli.progress import Bar

TASK = "An embedded task, or a FILE.py with model(), batches(split) and loss(model, batch)."
METHODS = "What to weigh, separated by commas; NAME=METHOD enters a method under another name."


def compare(
    task: Annotated[str, typer.Argument(help=TASK)] = "code-lm",
    methods: Annotated[str, typer.Option(help=METHODS)] = "adamw,lion,muon",
    trials: Annotated[int, typer.Option(min=1, help="Tuning trials per method.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Forward and backward passes of a final run.")] = 300,
    tune_steps: Annotated[int | None, typer.Option(min=1, help="Those of a trial, by default as many.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Final runs per method, paired across methods.")] = 3,
    out: Annotated[
        Path | None, typer.Option(help="Folder of results.json and the journal, by default runs/compare/TASK.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the study.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of going on from the journal.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON instead of a table.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Weigh methods against each other: equal tuning, paired seeds, finished schedules, and how sure the answer is.

    Killed at any point, the same command goes on where it stood.
    """
    from poise.compare import provenance, study, table, tasks
    from poise.compare.journal import Journal
    from poise.compare.results import Settings

    with bad_input():
        settings = Settings(trials=trials, tune_steps=tune_steps or steps, steps=steps, seeds=seeds, seed=seed)
        entries = parse(methods)
        study.check(entries)
        problem = tasks.load(task)
        folder = out or Path("runs", "compare", problem.name)
        if fresh:
            (folder / "journal.db").unlink(missing_ok=True)
        journal = Journal(folder / "journal.db")
    if not quiet and (outdated := journal.outdated({provenance.code(method) for method in entries.values()})):
        typer.echo(f"poise: {outdated} finished runs in {folder} were made by other code and do not count", err=True)
    try:
        with interruptible(), Bar(study.budget(entries, settings), quiet=quiet or as_json) as bar:
            results = study.compare(problem, entries, settings, journal, bar)
    except KeyboardInterrupt:
        kept = f"{len(journal.rows)} finished runs are kept in {folder}"
        raise stop(f"poise: interrupted; {kept}, the same command goes on from there", INTERRUPTED) from None
    results.write(folder / "results.json")
    if as_json:
        typer.echo(results.model_dump_json(indent=1))
    else:
        console = terminal_or_wide()
        console.print(table.render(results))
        console.print(f"written: {folder / 'results.json'}", style="dim", highlight=False, markup=False)
    if not results.verdict.ranking:
        raise typer.Exit(BROKEN)


def parse(methods: str) -> dict[str, catalog.Method]:
    """The entries in "adamw,again=adamw,lion", by the name they are shown under.

    Raises:
        ValueError: if a name is taken twice or is not made of letters, digits, `.`, `_` and `-`, or a method is unknown.
    """
    entries: dict[str, catalog.Method] = {}
    for entry in methods.split(","):
        name, _, method = (part.strip() for part in entry.partition("="))
        if not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"--methods {methods!r}: {name!r} is no name; write METHOD or NAME=METHOD, separated by commas")
        if name in entries:
            raise ValueError(f"--methods {methods!r}: {name!r} stands twice; enter the second as NAME={method or name}")
        entries[name] = catalog.get(method or name)
    return entries
