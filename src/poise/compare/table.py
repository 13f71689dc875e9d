"""A comparison in the terminal: one row a method, best first, then what to know before trusting it, then the verdict."""

from __future__ import annotations

from statistics import median

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from poise.compare.digits import ratio, spread
from poise.compare.results import MethodResult, Results, Speedup, Timing


def render(results: Results) -> RenderableType:
    """Everything that `poise compare` prints, from the results alone."""
    settings = results.settings
    unit = f" in {results.unit}" if results.unit else ""
    table = Table(
        title=f"{results.task}: final loss{unit} after {settings.steps} passes",
        caption=f"tuning: {settings.trials} × {settings.tune_steps} passes; {settings.seeds} paired seeds; 95 % intervals",
    )
    table.add_column("method", no_wrap=True)
    some = some_train_less(results)
    for column in (
        *(("trains",) if some else ()),
        "final loss",
        f"minus {results.reference}",
        "speed-up",
        "state B/param",
        "ms/step",
        "ratio",
        "lr",
        "diverged",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for found in sorted(results.methods, key=lambda found: found.final.mean if found.final else float("inf")):
        name, *rest = row(found, is_reference=found.name == results.reference)
        table.add_row(name, *((trains(found),) if some else ()), *rest)
    return Group(table, *map(Text, notes(results)), Text(results.verdict.sentence, style="bold"))


def row(found: MethodResult, is_reference: bool) -> list[str]:
    runs = found.finals or found.trials
    lr = found.fixed.get("lr", found.trials[found.best].hyper.get("lr") if found.best is not None else None)
    return [
        found.name,
        spread(found.final),
        "" if is_reference else spread(found.to_reference, sign="+"),
        "" if is_reference else times(found.speedup),
        f"{median(run.state_bytes / run.parameters for run in runs):.2f}",
        *seconds(found.timing),
        "" if lr is None else f"{lr:g}{'!' if 'lr' in found.edges else ''}",
        f"{found.divergences} of {len(found.trials) + len(found.finals)}",
    ]


def some_train_less(results: Results) -> bool:
    """Whether an entry trains a part of the model only."""
    return any(run.trained < run.parameters for found in results.methods for run in (*found.finals, *found.trials))


def trains(found: MethodResult) -> str:
    """How many parameters an entry trained."""
    return f"{(found.finals or found.trials)[0].trained:,}"


def times(value: Speedup | None) -> str:
    if value is None:
        return ""
    return ratio(value) + (f" [{value.low:.2f}, {value.high:.2f}]" if value.bound == "exact" else "")


def seconds(value: Timing | None) -> tuple[str, str]:
    return ("", "") if value is None else (f"{1e3 * value.seconds_per_step:.3g}", f"{value.ratio:.2f}")


def notes(results: Results) -> list[str]:
    """What could make the table say less than it seems to."""
    found = []
    for method in results.methods:
        found += [
            f"! {method.name}: {name} was chosen at the {side} end of its space; a wider space might do better"
            for name, side in method.edges.items()
        ]
        if method.widened:
            found.append(f"{method.name}: the last trials looked beyond the first range of {', '.join(method.widened)}")
    unfinished = [method.name for method in results.methods if method.speedup and method.speedup.bound != "exact"]
    if unfinished:
        steps = ", ".join(str(point.passes) for point in results.budgets)
        found.append(
            f"speed-ups of {', '.join(unfinished)} are bounds: {results.reference} was finished at {steps} passes only"
        )
    return found
