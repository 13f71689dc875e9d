"""`poise methods`: the catalog."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from poise import catalog
from poise.cli.exits import bad_input


def methods(
    family: Annotated[str | None, typer.Option(help=f"Only this family: {', '.join(catalog.ROOMS)}.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of objects.")] = False,
) -> None:
    """List every method: its name, its paper, what it does."""
    with bad_input():
        found = catalog.methods(family)
    if as_json:
        typer.echo(json.dumps([method.as_dict() for method in found], indent=1, ensure_ascii=False))
        return
    table = Table("method", "family", "kind", "year", "arXiv", "what it does")
    for method in found:
        year = "" if method.paper.year is None else str(method.paper.year)
        table.add_row(method.name, method.family, method.kind, year, method.paper.arxiv or "", escape(method.summary))
    terminal_or_wide().print(table)


def terminal_or_wide() -> Console:
    """A console as wide as the terminal, or wide enough for a table where there is none to ask."""
    console = Console()
    return console if console.is_terminal else Console(width=140)
