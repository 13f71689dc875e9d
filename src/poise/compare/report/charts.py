"""Final losses drawn: against the budgets of the reference, and against memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from poise.compare.digits import BOUNDS, half, ratio, spread
from poise.compare.results import Interval, MethodResult, Results, Speedup

from .looks import QUIET, Figure, Look, Trace, axis, figure, label, log_axis, looks
from .scale import Scale, scale


def budgets(results: Results) -> Figure:
    """The reference's finished runs by budget, every entry's own, and the line read off between them: the speed-up."""
    seen, drawn = looks(results), scale(results)
    look, reference = seen[results.reference], label(results.reference)
    known = [(at.passes, at.loss) for at in results.budgets if at.loss is not None]
    traces: list[Trace] = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "x": [passes for passes, _ in known],
            "y": [drawn(loss.mean) for _, loss in known],
            "error_y": errors([loss for _, loss in known], look),
            "name": f"{reference} at every budget",
            "line": {"color": look.colour, "width": 1.8},
            "marker": {"color": look.colour, "symbol": look.symbol, "size": 7},
            "customdata": [spread(loss) for _, loss in known],
            "hovertemplate": "<b>%{fullData.name}</b><br>%{x} passes<br>final loss %{customdata}<extra></extra>",
        }
    ]
    for found in results.methods:
        if found.final is not None and found.name != results.reference:
            look, shared = seen[found.name], {"legendgroup": found.name}
            if found.speedup is not None:
                height = drawn(found.final.mean)
                traces.append(read_off(found.name, found.speedup, results, height, look) | shared)
            traces.append(point(found, look, drawn, results.settings.steps, "final loss", **shared))
    ticks: dict[str, Any] = {"tickvals": [at.passes for at in results.budgets], "dtick": None}
    across = log_axis("forward and backward passes (logarithmic)", tickfont={"size": 12}, **ticks)
    return figure(traces, 420, xaxis=across, yaxis=drawn.axis())


def read_off(name: str, speedup: Speedup, results: Results, height: float, look: Look) -> Trace:
    """From an entry's own budget to that at which the reference reaches its loss; an arrow where it was not seen to."""
    symbol = {"exact": "line-ns-open", "at least": "arrow-right", "at most": "arrow-left"}[speedup.bound]
    needs = f"{label(results.reference)} needs {BOUNDS[speedup.bound]}{speedup.passes:.5g} passes"
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [results.settings.steps, speedup.passes],
        "y": [height, height],
        "name": f"{label(name)}, read off",
        "line": {"color": look.colour, "width": 1.2, "dash": "dot"},
        "marker": {"symbol": ["circle", symbol], "size": [0, 10], "color": look.colour},
        "hovertemplate": f"<b>{label(name)}</b><br>{ratio(speedup)}: {needs}<extra></extra>",
        "showlegend": False,
    }


def frontier(results: Results) -> Figure:
    """Final loss against bytes of optimizer state per parameter, and the line of those that nothing beats in both."""
    seen, drawn = looks(results), scale(results)
    placed = [(state_bytes(found), found.final.mean, found) for found in results.methods if found.final is not None]
    steps = list(pareto([(size, loss) for size, loss, _ in placed]))
    traces: list[Trace] = []
    if len(steps) > 1:
        stairs = {"x": [size for size, _ in steps], "y": [drawn(loss) for _, loss in steps], "hoverinfo": "skip"}
        line = {"color": QUIET[0], "width": 1, "dash": "dot", "shape": "hv"}
        traces.append({"type": "scatter", "mode": "lines", "name": "nothing beats these in both", "line": line} | stairs)
    for size, _, found in placed:
        traces.append(point(found, seen[found.name], drawn, size, "final loss", unit="bytes per parameter"))
    across = axis("bytes of optimizer state per parameter", rangemode="tozero")
    return figure(traces, 420, xaxis=across, yaxis=drawn.axis())


def point(found: MethodResult, look: Look, drawn: Scale, x: float, what: str, unit: str = "passes", **more: Any) -> Trace:
    """An entry's final loss with its interval, at `x`."""
    assert found.final is not None
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [x],
        "y": [drawn(found.final.mean)],
        "error_y": errors([found.final], look),
        "name": label(found.name),
        "marker": {"color": look.colour, "symbol": look.symbol, "size": 10},
        "customdata": [spread(found.final)],
        "hovertemplate": f"<b>%{{fullData.name}}</b><br>{what} %{{customdata}}<br>%{{x:.5g}} {unit}<extra></extra>",
    } | more


def errors(values: Sequence[Interval], look: Look) -> dict[str, Any]:
    """Half widths as error bars."""
    return {
        "type": "data",
        "array": [half(value) or 0.0 for value in values],
        "color": look.colour,
        "thickness": 1.2,
        "width": 4,
    }


def state_bytes(found: MethodResult) -> float:
    """Bytes of optimizer state per parameter, measured."""
    return median(run.state_bytes / run.parameters for run in found.finals or found.trials)


def pareto(points: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Those that no other is at most as large and lower than, from the smallest on."""
    lowest = float("inf")
    for size, loss in sorted(points):
        if loss < lowest:
            lowest = loss
            yield size, loss
