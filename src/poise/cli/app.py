"""The verbs, put together."""

from __future__ import annotations

from typing import Annotated

import typer

import poise
from poise.cli import compare, inspect, merge, methods, plan, report, train, verify

app = typer.Typer(
    name="poise",
    help="Optimizes the weights of neural networks, and weighs the methods that do it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("methods")(methods.methods)
app.command("compare")(compare.compare)
app.command("report")(report.report)
app.command("train")(train.train)
app.command("inspect")(inspect.inspect)
app.command("verify")(verify.verify)
app.command("merge")(merge.merge)
planner = typer.Typer(
    cls=plan.ByCommand,
    help="Say what a command will need, memory, disk and time, and every error that can be known before. "
    "What is no command is a task, and `poise plan TASK` is `poise plan train TASK`.",
    no_args_is_help=False,
)
planner.command("train")(plan.plan)
planner.command("merge")(merge.plan_merge)
app.add_typer(planner, name="plan")


def version(asked: bool) -> None:
    if asked:
        typer.echo(poise.__version__)
        raise typer.Exit


@app.callback()
def options(
    asked: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """What stands before the verb."""
