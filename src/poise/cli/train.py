"""`poise train`: one task, one method, to the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from poise import catalog
from poise.cli.compare import TASK, device_of, one_task
from poise.cli.exits import BROKEN, INTERRUPTED, bad_input, interruptible, stop
from poise.cli.progress import Bar

SET = "A setting of the method, as NAME=VALUE; may stand several times."


def train(
    task: Annotated[str | None, typer.Argument(help=TASK, show_default="code-lm")] = None,
    task_option: Annotated[str | None, typer.Option("--task", help="The same.", hidden=True)] = None,
    method: Annotated[str, typer.Option(help="A method of the catalog.")] = "adamw",
    adapt: Annotated[
        str | None, typer.Option(help="Train adapters of this kind, and nothing else: poise methods --family adapt.")
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help=SET)] = None,
    state: Annotated[str | None, typer.Option(help="Format of the optimizer's state: fp32, bf16, int8, int4, ...")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Forward and backward passes; the schedule ends with them.")] = 1000,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Passes between two checkpoints.")] = 100,
    out: Annotated[Path | None, typer.Option(help="Folder of checkpoint and model, by default runs/train/TASK.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the initial weights and the order of the data.")] = 0,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda, cuda:1, mps, ...")] = "cpu",
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of going on from the checkpoint.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Train a task with one method: a finished schedule, exact resume, weights as safetensors.

    Killed at any point, the same command goes on from the last checkpoint and takes the steps it would have taken. A run that
    diverges is stopped, and ends with exit code 1.
    """
    from poise.compare import plan, tasks
    from poise.compare.driven import AROUND
    from poise.compare.entries import entry_of, setting
    from poise.compare.fit import CHECKPOINT, Fit, fit

    with bad_input():
        fixed = dict(setting(text) for text in settings or [])
        if state is not None:
            fixed["state"] = state
        if adapt is not None:
            fixed[AROUND] = method
        shown = method if adapt is None else f"{adapt} with {method}"
        entries = {shown: entry_of(catalog.get(adapt or method), fixed)}
        problem = tasks.load(one_task(task, task_option))
        plan.check(entries, problem)
        folder = out or Path("runs", "train", problem.name)
        run = Fit(problem, entries[shown], seed, steps, folder, checkpoint_every, device_of(device))
        folder.mkdir(parents=True, exist_ok=True)
        if fresh:
            (folder / CHECKPOINT).unlink(missing_ok=True)
        begun = run.taken()
    try:
        with interruptible(), Bar(steps, quiet=quiet or as_json) as bar:

            def advance(passes: int, loss: float) -> None:
                bar.begin(f"{shown} on {problem.name}, loss {loss:.4f}")
                bar.advance(passes)

            bar.drop(begun)
            outcome = fit(run, advance)
    except KeyboardInterrupt:
        kept = f"{run.taken()} of {steps} passes are kept in {folder}"
        raise stop(f"poise: interrupted; {kept}, the same command goes on from there", INTERRUPTED) from None
    found = {
        "passes": outcome.passes,
        "diverged": outcome.diverged,
        "loss": {"tune": outcome.tune_loss, "report": outcome.loss},
        "resumed_from": outcome.resumed_from,
        "model": str(folder / "model") if not outcome.diverged and (folder / "model").exists() else None,
        "adapter": str(folder / "adapter") if not outcome.diverged and (folder / "adapter").exists() else None,
    }
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    elif outcome.diverged:
        typer.echo(f"poise: diverged after {outcome.passes} of {steps} passes and was stopped; try a lower lr", err=True)
    else:
        resumed = f" (went on from pass {outcome.resumed_from})" if outcome.resumed_from else ""
        unit = f" {problem.unit}" if problem.unit else ""
        typer.echo(f"{shown} on {problem.name}: {outcome.loss:.4g}{unit} on report after {outcome.passes} passes{resumed}")
        typer.echo("written: " + ", ".join(str(path) for path in (found["model"], found["adapter"]) if path is not None))
    if outcome.diverged:
        raise typer.Exit(BROKEN)
