"""`poise report`: the page of a finished comparison, made anew, alone or beside another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from poise.cli.exits import bad_input
from poise.cli.methods import terminal_or_wide

if TYPE_CHECKING:
    from poise.compare.results import Results


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished comparison, or its results.json.")],
    against: Annotated[Path | None, typer.Option(help="Another finished comparison of the same task.")] = None,
    out: Annotated[Path | None, typer.Option(help="The page, by default report.html beside results.json.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing.")] = False,
) -> None:
    """Make the HTML report of a finished comparison from its results.json. Nothing is run."""
    from poise.compare import against as beside
    from poise.compare import report as page
    from poise.compare.results import write_whole

    with bad_input():
        path, results = finished(folder)
        other = None if against is None else finished(against)[1]
        rows = [] if other is None else beside.set_beside(results, other)
    text = page.render(results, other)
    target = out or path.with_name("report.html")
    with bad_input():
        write_whole(target, text)
    if as_json:
        found = {"report": str(target), "verdict": results.verdict.model_dump(), "against": [row.as_dict() for row in rows]}
        typer.echo(json.dumps(found, indent=1, ensure_ascii=False))
    elif not quiet:
        console = terminal_or_wide()
        if other is not None:
            console.print(beside.table(results, other))
        console.print(results.verdict.sentence, style="bold", highlight=False, markup=False)
        console.print(f"written: {target}", style="dim", highlight=False, markup=False)


def finished(path: Path) -> tuple[Path, Results]:
    """The results in a folder, or in the file itself, and where they stand.

    Raises:
        ValueError: if there are none.
    """
    from poise.compare.results import Results

    found = path / "results.json" if path.is_dir() else path
    if not found.is_file():
        raise ValueError(f"{found}: no such file; poise compare writes it when it has finished")
    try:
        return found, Results.read(found)
    except ValueError as error:
        raise ValueError(str(error).partition("\n")[0]) from error  # pydantic has a line for every field
