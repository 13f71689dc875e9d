"""The learning curves."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from poise.compare.results import MethodResult, Results, Run

from .charts import point
from .looks import BAND, Figure, Look, Trace, axis, figure, label, looks
from .scale import Scale, scale

START = 0.1  # share of a run that the view leaves out
ROOM = 0.05  # above and below what is in view


def curves(results: Results, against: Results | None = None) -> Figure:
    """Mean training loss of the final runs, a band from the lowest to the highest seed, and the held-out loss at the end.

    Of `against`, the entries of the same name are drawn dashed.
    """
    seen, drawn = looks(results), scale(results)
    traces = [trace for found in results.methods for trace in course(results, found, seen[found.name], drawn)]
    for other in against.methods if against is not None else []:
        if against is not None and other.name in seen:
            line = {"color": seen[other.name].colour, "width": 1.8, "dash": "dash"}
            facts = {"name": f"{label(other.name)}, the other study", "legendgroup": other.name, "line": line}
            traces += [mean | facts for mean in mean_line(other, drawn)]
    across = axis("forward and backward passes", rangemode="tozero")
    return figure(traces, 460, xaxis=across, yaxis=drawn.axis() | view(results))


def course(results: Results, found: MethodResult, look: Look, drawn: Scale) -> list[Trace]:
    """One entry's curve, its band, and its end."""
    name, shared = label(found.name), {"legendgroup": found.name}
    line = {"color": look.colour, "width": 1.8, "dash": look.dash}
    traces = [mean | shared | {"name": name, "line": line} for mean in mean_line(found, drawn)]
    if not traces:
        return []
    passes, columns = shared_points(found.finals)
    if len(found.finals) > 1:
        high, low = ([drawn(pick(column)) for column in columns] for pick in (max, min))
        outline = {"x": [*passes, *reversed(passes)], "y": [*high, *reversed(low)], "mode": "lines", "line": {"width": 0}}
        band = {"type": "scatter", "fill": "toself", "fillcolor": look.colour + BAND, "hoverinfo": "skip", "showlegend": False}
        traces.append(outline | band | shared | {"name": f"{name}, seeds"})
    if found.final is not None:
        traces.append(point(found, look, drawn, results.settings.steps, "held-out loss", showlegend=False, **shared))
    else:
        marker = {"color": look.colour, "symbol": "x-thin-open", "size": 9, "line": {"width": 2}}
        end = {"type": "scatter", "mode": "markers", "x": passes[-1:], "y": traces[0]["y"][-1:], "marker": marker, "name": name}
        text = "<b>%{fullData.name}</b><br>diverged on a seed<extra></extra>"
        traces.append(end | shared | {"showlegend": False, "hovertemplate": text})
    return traces


def mean_line(found: MethodResult, drawn: Scale) -> list[Trace]:
    """The mean over the seeds; nothing where there is no point that all of them have."""
    passes, columns = shared_points(found.finals)
    means = [fmean(column) for column in columns]
    text = "<b>%{fullData.name}</b><br>%{x} passes<br>training loss %{customdata:.5g}<extra></extra>"
    facts: Trace = {"x": passes, "y": [drawn(mean) for mean in means], "customdata": means, "hovertemplate": text}
    return [{"type": "scatter", "mode": "lines"} | facts] if passes else []


def shared_points(runs: Sequence[Run]) -> tuple[list[int], list[list[float]]]:
    """The passes at which every run has a point, and the losses there: a mean over the survivors would hide who fell out."""
    if not runs:
        return [], []
    known = [dict(run.curve) for run in runs]
    passes = sorted(set(known[0]).intersection(*known[1:]))
    return passes, [[losses[at] for losses in known] for at in passes]


def view(results: Results) -> dict[str, Any]:
    """The part of the loss axis that is shown at first: without the fall of the first tenth, beside which all else looks equal.

    A run that blows up later leaves the view as well; a double click on the chart shows everything.
    """
    if results.optimum is not None:
        return {}
    early, lowest = [], []
    for found in results.methods:
        passes, columns = shared_points(found.finals)
        means = [fmean(column) for at, column in zip(passes, columns, strict=True) if at >= START * results.settings.steps]
        if means and found.final is not None:
            early.append(means[0])
            lowest += [min(means), found.final.mean]
    if not early:
        return {}
    low, high = min(lowest), max(early)
    room = ROOM * (high - low)
    return {"range": [low - room, high + room]} if room > 0 else {}
