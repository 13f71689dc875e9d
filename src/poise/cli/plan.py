"""`poise plan`: what a command will need. `poise plan train` is here, what a training step will."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from poise import catalog
from poise.cli.compare import TASK, device_of
from poise.cli.exits import BROKEN, INTERRUPTED, bad_input, interruptible, stop
from poise.cli.methods import terminal_or_wide
from poise.cli.train import SET

if TYPE_CHECKING:
    from poise.compare.needs import Needs, Peak

ROOM = 1.5  # of what was counted must be free before real steps are taken: a peak is above what is held
COLUMNS = ("weights", "gradients", "state", "activations", "total")


class ByCommand(TyperGroup):
    """`poise plan merge ...` plans a merge; what does not begin with a command is a training task and its options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] != "--help"):
            args = ["train", *args]
        return super().parse_args(ctx, args)


def plan(
    task: Annotated[str | None, typer.Argument(help=TASK, show_default="code-lm")] = None,
    model: Annotated[str | None, typer.Option("--model", help="The same.")] = None,
    method: Annotated[str, typer.Option("--optimizer", "--method", help="A method of the catalog.")] = "adamw",
    settings: Annotated[list[str] | None, typer.Option("--set", help=SET)] = None,
    state: Annotated[str | None, typer.Option(help="Format of the optimizer's state: fp32, bf16, int8, int4, ...")] = None,
    steps: Annotated[bool, typer.Option("--steps/--no-steps", help="Take real steps, where there is room, and watch.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights and the batch.")] = 0,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda, cuda:1, mps, ...")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say what memory a training step needs: weights, gradients, optimizer state and activations, part by part, and the peak.

    Bytes are counted without a step. The peak is measured on real ones, in a process of its own, where memory allows; else, and
    with --no-steps, only what was counted is said.
    """
    from poise.compare import needs, tasks
    from poise.compare.entries import entry_of, setting

    with bad_input():
        if task is not None and model is not None and task != model:
            raise ValueError(f"TASK {task!r} and --model {model!r}: one of the two is enough")
        name = task or model or "code-lm"
        texts = [*(settings or []), *([f"state={state!r}"] if state is not None else [])]
        entry = entry_of(catalog.get(method), dict(setting(text) for text in texts))
        problem = tasks.load(name)
        where = device_of(device)
    try:
        with interruptible():
            found = needs.count(problem, entry, where, seed)
            free = needs.available()
            fits = free is None or where != "cpu" or found.whole.total * ROOM < free
            told = [name, method, json.dumps(texts), str(seed), where]
            peak = needs.measure(told) if steps and fits else needs.Peak(None, None, None if not steps else "no room")
    except KeyboardInterrupt:
        raise stop("poise: interrupted", INTERRUPTED) from None
    if as_json:
        measured = {"peak": peak.peak, "between_steps": peak.between, "failed": peak.failed, "available": free}
        typer.echo(json.dumps({"task": problem.name, "method": method, **found.as_dict(), **measured}, indent=1))
    else:
        show(found, peak, f"{method} on {problem.name}, batch of {found.batch}", free)
    if steps and fits and peak.failed is not None:
        raise stop(f"poise: the steps that were to be measured failed: {peak.failed}", BROKEN)


def show(found: Needs, peak: Peak, title: str, free: int | None) -> None:
    """The table, and a line about the peak."""
    table = Table("part", "parameters", *COLUMNS, title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for part in (*found.parts, found.whole):
        last = part is found.parts[-1]
        table.add_row(
            escape(part.name), f"{part.parameters:,}", *(size(getattr(part, name)) for name in COLUMNS), end_section=last
        )
    terminal_or_wide().print(table)
    if peak.peak is not None:
        typer.echo(f"peak of a step, measured: {size(peak.peak)}; between steps: {size(peak.between or 0)}")
    elif peak.failed == "no room":
        typer.echo(f"no step was taken: {size(found.whole.total)} are needed at least, and {size(free or 0)} are free")


def size(count: int) -> str:
    """Bytes as a person reads them."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")
