"""A comparison in the terminal: one row a method, best first, then what to know before trusting it, then the verdict."""

from __future__ import annotations

from statistics import median

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from poise.compare.results import Interval, MethodResult, Results


def render(results: Results) -> RenderableType:
    """Everything that `poise compare` prints, from the results alone."""
    settings = results.settings
    unit = f" in {results.unit}" if results.unit else ""
    table = Table(
        title=f"{results.task}: final loss{unit} after {settings.steps} passes",
        caption=f"tuning: {settings.trials} × {settings.tune_steps} passes; {settings.seeds} paired seeds; 95 % t intervals",
    )
    table.add_column("method", no_wrap=True)
    for column in ("final loss", f"minus {results.reference}", "state B/param", "ms/step", "update ms", "lr", "diverged"):
        table.add_column(column, justify="right", no_wrap=True)
    for found in sorted(results.methods, key=lambda found: found.final.mean if found.final else float("inf")):
        table.add_row(*row(found, is_reference=found.name == results.reference))
    return Group(table, *map(Text, notes(results)), Text(results.verdict.sentence, style="bold"))


def row(found: MethodResult, is_reference: bool) -> list[str]:
    runs = found.finals or found.trials
    lr = found.trials[found.best].hyper.get("lr") if found.best is not None else None
    return [
        found.name,
        spread(found.final),
        "" if is_reference else spread(found.to_reference, sign="+"),
        f"{median(run.state_bytes / run.parameters for run in runs):.2f}",
        f"{1e3 * median(run.seconds_per_step for run in runs):.1f}",
        f"{1e3 * median(run.optimizer_seconds_per_step for run in runs):.1f}",
        "" if lr is None else f"{lr:g}{'!' if 'lr' in found.edges else ''}",
        f"{found.divergences} of {len(found.trials) + len(found.finals)}",
    ]


def spread(value: Interval | None, sign: str = "") -> str:
    """Mean and half width."""
    if value is None:
        return "diverged"
    half = "" if value.low is None or value.high is None else f" ± {(value.high - value.low) / 2:.4f}"
    return f"{value.mean:{sign}.4f}{half}"


def notes(results: Results) -> list[str]:
    """What could make the table say less than it seems to."""
    found = [
        f"! {method.name}: {name} was chosen at the {side} end of its space; a wider space might do better"
        for method in results.methods
        for name, side in method.edges.items()
    ]
    return [*found, "Seconds are indicative: they are measured inside the runs, whatever else the machine was doing."]
