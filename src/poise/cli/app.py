"""The verbs, put together."""

from __future__ import annotations

from typing import Annotated

import typer

import poise
from poise.cli import compare, inspect, methods, plan, report, train, verify

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
app.command("plan")(plan.plan)
app.command("inspect")(inspect.inspect)
app.command("verify")(verify.verify)


def version(asked: bool) -> None:
    if asked:
        typer.echo(poise.__version__)
        raise typer.Exit


@app.callback()
def options(
    asked: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """What stands before the verb."""
