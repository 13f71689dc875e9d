"""`poise merge`: many checkpoints to one; and `poise plan merge`, what that will need."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from poise.cli.exits import BROKEN, INTERRUPTED, USAGE, bad_input, interruptible, stop
from poise.cli.methods import terminal_or_wide
from poise.cli.progress import BytesBar

if TYPE_CHECKING:
    from poise.merge.merger import Merger
    from poise.merge.merging import Merged

Recipe = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="A recipe in mergekit's YAML.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the merged model.")]
Dtype = Annotated[str | None, typer.Option(help="Of the result: float32, bfloat16, float16; beats the recipe's.")]
Seed = Annotated[int, typer.Option(min=0, help="Of methods that draw, where the recipe names none.")]
Common = Annotated[bool, typer.Option("--common-rows", help="Where vocabularies differ, merge the rows that all models have.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="A setting, NAME=VALUE, which beats the recipe's; may stand several times.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")]


def merge(
    recipe: Recipe,
    out: Out,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over instead of going on where an earlier run was broken off.")
    ] = False,
    max_shard_size: Annotated[str, typer.Option(help="A larger file of weights is divided.")] = "5GB",
    dtype: Dtype = None,
    seed: Seed = 0,
    common_rows: Common = False,
    settings: Set = None,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Merge models by a recipe, into a folder that transformers loads.

    Killed at any point, the same command goes on from the finished files, and ends with the same bytes. What was
    written is read again and checked; if it is not what it must be, the exit code is 1.
    """
    from poise.checkpoint import CheckpointError
    from poise.checkpoint.planned import parse_size
    from poise.merge.merging import run

    with bad_input():
        shard = parse_size(max_shard_size)
        merger = prepared(recipe, dtype, seed, common_rows, settings)
        merger.plan.check()
    try:
        with interruptible(), BytesBar(quiet=quiet or as_json) as bar:
            merged = run(merger, out, max_shard_bytes=shard, fresh=fresh, progress=bar.at)
    except KeyboardInterrupt as error:
        said = str(error) or "interrupted; the same command goes on from the shards that are finished"
        raise stop(f"poise: {said}", INTERRUPTED) from None
    except (CheckpointError, ValueError, OSError) as error:
        # Models are read to their last number only here: NaN in one of them, or a full disk, is bad input all the same.
        raise stop(f"poise: {error}", USAGE) from error
    if as_json:
        typer.echo(json.dumps(merged.as_dict(), indent=1, ensure_ascii=False))
    else:
        show(merged)
    if merged.broken:
        raise stop("\n".join(f"poise: {line}" for line in merged.broken), BROKEN)


def plan_merge(
    recipe: Recipe,
    out: Out,
    dtype: Dtype = None,
    seed: Seed = 0,
    common_rows: Common = False,
    settings: Set = None,
    max_shard_size: Annotated[str, typer.Option(help="A larger file of weights is divided.")] = "5GB",
    as_json: Json = False,
) -> None:
    """Say what a merge will need, memory, disk and time, and everything that is wrong with it as far as headers tell.

    No tensor is read but some rows, to estimate the time. With errors the exit code is 2.
    """
    from poise.checkpoint.planned import check_disk, divide, parse_size, readable
    from poise.merge.needs import needs

    with bad_input():
        shard = parse_size(max_shard_size)
        merger = prepared(recipe, dtype, seed, common_rows, settings)
        errors = [str(error) for error in merger.plan.errors]
        found = needs(merger, timed=not errors)
        try:
            check_disk(out, found.written)
        except ValueError as error:
            errors.append(str(error))
        files = len(divide(merger.planned, shard)) if merger.planned else 1
    notes = [*merger.plan.notes, *merger.side_files.notes]
    if as_json:
        said = {"shards": files, "tensors": len(merger.planned), "notes": notes, "errors": errors}
        known = {"recipe": str(recipe), "method": merger.method.name, **vars(found), **said}
        typer.echo(json.dumps(known, indent=1, ensure_ascii=False))
    elif not errors:
        table = Table("", "", show_header=False, title=f"{merger.method.name} by {recipe}", title_justify="left")
        for i, model in enumerate(merger.parents):
            table.add_row(f"model {i}", escape(f"{model}, {model.checkpoint.parameters:,} parameters"))
        table.add_row("result", f"{len(merger.planned)} tensors, {readable(found.written)} in {files} file{'s' * (files > 1)}")
        table.add_row("read", readable(found.read))
        table.add_row("memory", f"at most {readable(found.memory)} above the program's own")
        if found.seconds is not None:
            table.add_row("time", f"at least {found.seconds:.0f} s")
        terminal_or_wide().print(table)
    if not as_json:
        for note in notes:
            typer.echo(f"note: {note}")
    if errors:
        raise stop("\n".join(f"poise: {error}" for error in errors), USAGE)


def prepared(recipe: Path, dtype: str | None, seed: int, common_rows: bool, settings: Iterable[str] | None) -> Merger:
    """The recipe, read and planned over its models."""
    from poise.merge.merger import Merger
    from poise.merge.recipe import read

    fixed = dict(assignment(text) for text in settings or ())
    return Merger(read(recipe), settings=fixed, seed=seed, dtype=dtype, common_rows=common_rows)


def assignment(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value as YAML reads it: a number, a word, or a list, which is a gradient over the layers."""
    import yaml

    from poise.merge.api import setting

    name, equal, value = text.partition("=")
    if not name or not equal:
        raise ValueError(f"--set {text!r} must be NAME=VALUE")
    try:
        return name, setting(yaml.safe_load(value))
    except yaml.YAMLError:
        raise ValueError(f"--set {text!r}: {value!r} is not a value") from None


def show(merged: Merged) -> None:
    """The table at the end."""
    from poise.checkpoint.planned import readable

    table = Table("", "", show_header=False, title=f"{merged.method}: {merged.out}", title_justify="left")
    for i, model in enumerate(merged.models):
        table.add_row(f"model {i}", escape(model))
    copied = f", {merged.copied} of them copied" if merged.copied else ""
    table.add_row("tensors", f"{merged.tensors}{copied}")
    table.add_row("parameters", f"{merged.parameters:,}")
    found = f", {merged.found} of them finished before" if merged.found else ""
    table.add_row("files", f"{merged.shards}{found}, {readable(merged.nbytes)}")
    table.add_row("seconds", f"{merged.seconds:.1f}")
    table.add_row("verified", "no" if merged.broken else "yes: names, shapes, finite numbers, rows merged again")
    terminal_or_wide().print(table)
    for note in merged.notes:
        typer.echo(f"note: {note}")
