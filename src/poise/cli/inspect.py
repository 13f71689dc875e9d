"""`poise inspect`: what is in a checkpoint, and what stands out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from poise.cli.exits import INTERRUPTED, USAGE, bad_input, interruptible, stop
from poise.cli.plan import size
from poise.cli.progress import Bar

if TYPE_CHECKING:
    from poise.checkpoint.inspecting import Inspection, Tensor

PATH = "A directory of a model or an adapter, or a file of safetensors, GGUF or torch.save."
SORTS = {
    "size": lambda t: -t.info.numel,
    "norm": lambda t: -number(t.statistics.norm),
    "rms": lambda t: -number(t.statistics.rms),
    "outliers": lambda t: -number(t.statistics.largest),
    "kurtosis": lambda t: -number(t.statistics.kurtosis),
    "condition": lambda t: -(number(t.spectrum.condition) if t.spectrum is not None else -math.inf),
}
STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}
SPECTRAL = ("s1", "stable rank", "eff. rank", "condition")
WIDE = 240
LISTED = 20  # findings in the terminal; JSON and the page have all of them


def inspect(
    path: Annotated[Path, typer.Argument(help=PATH)],
    spectra: Annotated[
        bool, typer.Option("--spectra", help="Singular values of every matrix as well: minutes, not seconds.")
    ] = False,
    match: Annotated[str | None, typer.Option(help="Only tensors whose name this glob matches, as '*.q_proj.*'.")] = None,
    sort: Annotated[str, typer.Option(help=f"Order of the table: file, name, {', '.join(SORTS)}.")] = "file",
    html: Annotated[Path | None, typer.Option(help="Write a page with plots here: one file that needs no network.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar and no table.")] = False,
) -> None:
    """Show what a checkpoint holds: every tensor with what it is and what its entries are like, and what stands out first.

    Every tensor is read once, a few rows at a time.
    """
    from poise import checkpoint as weights
    from poise.checkpoint import inspecting

    with bad_input():
        if sort not in ("file", "name", *SORTS):
            raise ValueError(f"--sort {sort!r}: known are file, name, {', '.join(SORTS)}")
        opened = weights.open_checkpoint(path, strict=False)
        names = inspecting.matching(opened, match)
    try:
        with interruptible(), Bar(len(names), quiet=quiet or as_json) as bar:
            found = inspecting.inspect(opened, match=match, spectra=spectra, advance=lambda name: step(bar, name))
    except (weights.CheckpointError, OSError) as error:
        raise stop(f"poise: {error}", USAGE) from error
    except KeyboardInterrupt:
        raise stop("poise: interrupted", INTERRUPTED) from None
    if html is not None:
        from poise.compare import inspection

        with bad_input():
            inspection.write(found, html)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=1, ensure_ascii=False))
    elif not quiet:
        show(found, sort, console())
        if html is not None:
            typer.echo(f"written: {html}")


def console() -> Console:
    """As wide as the terminal; where there is none, wide enough for the longest names."""
    found = Console()
    return found if found.is_terminal else Console(width=WIDE)


def step(bar: Bar, name: str) -> None:
    bar.begin(name)
    bar.advance(1)


def show(found: Inspection, sort: str, console: Console) -> None:
    """What stands out, totals, then every tensor."""
    for finding in found.findings[:LISTED]:
        of = "" if finding.tensor is None else f"{finding.tensor}: "
        console.print(Text(f"{finding.level}: {of}{finding.says}", style=STYLES[finding.level]), highlight=False)
    if len(found.findings) > LISTED:
        console.print(f"and {len(found.findings) - LISTED} more, with --json or --html", style="dim")
    if not found.findings:
        console.print("nothing stands out", style="dim")
    console.print(totals(found), highlight=False)
    for title, sums in (("dtype", found.dtypes), ("role", found.roles)):
        console.print(summary(title, sums))
    console.print(tensors(found, sort))


def totals(found: Inspection) -> str:
    stacks = ", ".join(f"{count} in {stack}" for stack, count in found.structure.stacks.items())
    tied = found.structure.tied
    head = f"; head: {tied.embedding} (tied)" if tied.shared else f"; head: {tied.head}" if tied.head is not None else ""
    layers = f"; layers: {stacks}" if stacks else ""
    return f"{found.parameters:,} parameters, {size(found.nbytes)}{layers}{head}"


def summary(title: str, sums: dict[str, tuple[int, int, int]]) -> Table:
    table = Table(title, "tensors", "parameters", "bytes", "share", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    whole = sum(nbytes for _, _, nbytes in sums.values())
    for column in table.columns[1:]:
        column.justify = "right"
    for key, (count, parameters, nbytes) in sums.items():
        share = f"{nbytes / whole:.1%}" if whole else ""
        table.add_row(key, f"{count:,}", f"{parameters:,}", size(nbytes), share)
    return table


def tensors(found: Inspection, sort: str) -> Table:
    """Every tensor in a line; columns that would say the same of all of them are left out."""
    spectral = any(tensor.spectrum is not None for tensor in found.tensors)
    several = len(found.dtypes) > 1
    table = Table("tensor", "role", "shape", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.columns[0].overflow = "fold"
    if several:
        table.add_column("dtype", no_wrap=True)
    for heading in ("norm", "rms", "max/rms", "kurtosis", "zeros", *(SPECTRAL if spectral else ())):
        table.add_column(heading, justify="right", no_wrap=True)
    for tensor in ordered(found.tensors, sort):
        seen, what, spectrum = tensor.statistics, tensor.described, tensor.spectrum
        shape = " x ".join(map(str, tensor.info.shape)) or "0-d"
        cells = [escape(tensor.name), what.role, shape + (" (in, out)" if what.inputs_first else "")]
        cells += [str(tensor.info.dtype).removeprefix("torch.")] if several else []
        cells += [short(value) for value in (seen.norm, seen.rms, seen.largest, seen.kurtosis)]
        cells.append(f"{seen.zeros / seen.count:.1%}" if seen.zeros else "")
        if spectral and spectrum is not None:
            values = (spectrum.spectral, spectrum.stable_rank, spectrum.effective_rank, spectrum.condition)
            cells += [short(value) for value in values]
        table.add_row(*cells, style="red" if seen.nan or seen.inf else None)
    return table


def ordered(tensors: list[Tensor], sort: str) -> list[Tensor]:
    if sort == "file":
        return tensors
    return sorted(tensors, key=(lambda t: t.name) if sort == "name" else SORTS[sort])


def number(value: float | None) -> float:
    """`value` to sort by: nothing known comes last."""
    return -math.inf if value is None or math.isnan(value) else value


def short(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.3g}"
