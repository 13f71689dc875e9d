"""`poise verify`: whether one checkpoint is what another was meant to become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from poise.cli.compare import device_of
from poise.cli.exits import BROKEN, INTERRUPTED, USAGE, bad_input, interruptible, stop
from poise.cli.inspect import PATH, short, step
from poise.cli.methods import terminal_or_wide
from poise.cli.progress import Bar

if TYPE_CHECKING:
    from rich.console import Console

    from poise.checkpoint.comparing import Comparison

TASK = "A task, or a FILE.py with model(), batches(split) and loss(model, batch): its loss with the weights of both."
SHOWN = 25  # tensors in the terminal, those with the largest error; JSON has all of them


def verify(
    a: Annotated[Path, typer.Argument(help=PATH)],
    b: Annotated[Path, typer.Argument(help="The checkpoint that is judged beside it.")],
    task: Annotated[str | None, typer.Option(help=TASK)] = None,
    outputs: Annotated[bool, typer.Option("--outputs/--no-outputs", help="Run both models, where transformers can.")] = True,
    text: Annotated[Path | None, typer.Option(help="Run them on the start of this text, not on random tokens.")] = None,
    max_error: Annotated[float | None, typer.Option(min=0, help="Bound on |b - a| of every entry.")] = None,
    max_kl: Annotated[float | None, typer.Option(min=0, help="Bound on the mean KL divergence of outputs, in nats.")] = None,
    max_loss_increase: Annotated[float | None, typer.Option(help="Bound on the loss with B minus that with A.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the random tokens.")] = 0,
    device: Annotated[str, typer.Option(help="Where models are run: cpu, cuda, cuda:1, mps, ...")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar; print broken bounds only.")] = False,
) -> None:
    """Compare checkpoint B with A: names, shapes, every tensor, what the models put out, the loss on a task.

    Ends with 1 if a name or a shape differs, an entry is not finite that was, or a bound is broken; and says which and where.
    """
    from poise import checkpoint as weights
    from poise.checkpoint import comparing
    from poise.checkpoint import outputs as running
    from poise.compare import scoring, tasks

    with bad_input():
        if max_loss_increase is not None and task is None:
            raise ValueError("--max-loss-increase needs a --task to measure the loss on")
        if max_kl is not None and not outputs:
            raise ValueError("--max-kl and --no-outputs: the divergence is one of outputs")
        if text is not None and not text.is_file():
            raise ValueError(f"--text {text}: no such file")
        problem = None if task is None else tasks.load(task)
        where = device_of(device)
        left, right = weights.open_checkpoint(a, strict=False), weights.open_checkpoint(b, strict=False)
    bounds = comparing.Bounds(max_error, max_kl, max_loss_increase)
    try:
        with interruptible(), Bar(len(left), quiet=quiet or as_json) as bar:
            found = comparing.verify(
                left,
                right,
                bounds,
                outputs=(lambda a, b: running.diverge(a, b, text=text, seed=seed, device=where)) if outputs else None,
                score=None if problem is None else (lambda checkpoint: scoring.score(problem, checkpoint, device=where)),
                advance=lambda name: step(bar, name),
            )
    except (weights.CheckpointError, OSError) as error:
        raise stop(f"poise: {error}", USAGE) from error
    except KeyboardInterrupt:
        raise stop("poise: interrupted", INTERRUPTED) from None
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=1, ensure_ascii=False))
    elif not quiet:
        show(found, terminal_or_wide(), "" if problem is None else problem.name)
    if found.broken:
        raise stop("\n".join(f"poise: {line}" for line in found.broken), BROKEN)


def show(found: Comparison, console: Console, task: str) -> None:
    changed = sorted((one for one in found.tensors if not one.equal), key=lambda one: -one.max_error)
    if changed:
        table = Table("tensor", "dtype", "max error", "at", "relative", "cosine", box=SIMPLE_HEAD, pad_edge=False)
        for column in table.columns[2:]:
            column.justify = "right"
        for one in changed[:SHOWN]:
            dtype = one.dtypes[0] if one.dtypes[0] == one.dtypes[1] else " -> ".join(one.dtypes)
            at = "" if one.at is None else str(list(one.at))
            table.add_row(escape(one.name), dtype, short(one.max_error), at, short(one.relative), f"{one.cosine:.6f}")
        console.print(table)
    same = len(found.tensors) - len(changed)
    more = f", the {SHOWN} with the largest error above" if len(changed) > SHOWN else ""
    typer.echo(f"{same} of {len(found.tensors)} tensors are equal in every bit, {len(changed)} differ{more}")
    if (seen := found.outputs) is not None:
        kl = "" if seen.kl is None else f", KL {seen.kl:.3g} nats, same first choice at {seen.agreement:.1%} of positions"
        typer.echo(f"outputs on {seen.inputs}: largest difference {seen.max_difference:.3g} ({seen.relative:.2g} relative){kl}")
    elif found.outputs_missing != "not asked for":
        typer.echo(f"outputs were not compared: {found.outputs_missing}")
    if found.losses is not None:
        a, b = found.losses
        typer.echo(f"loss on {task}: {a:.6g} with A, {b:.6g} with B ({b - a:+.3g})")
