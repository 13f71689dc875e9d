"""The tuning scatter: every trial of one method, a panel for each hyper-parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from poise.compare.digits import setting
from poise.compare.results import MethodResult, Results, Run

from .looks import INK, QUIET, Figure, Look, Trace, axis, figure, label, log_axis, looks
from .scale import Scale, scale

COLUMNS = 3
PANEL = 250  # pixels
GAP = 0.04  # between panels, of the whole
ROOM = 0.12  # of the losses' span, above the highest: where diverged trials stand


def tuning(results: Results, found: MethodResult) -> Figure | None:
    """Losses of the trials by each hyper-parameter; None if there was nothing to tune or no trial.

    Vertical lines are the ends of the space, a shaded field is where it was widened to, the ring is the choice, and crosses at
    the top are trials that diverged.
    """
    if not found.space or not found.trials:
        return None
    columns = min(COLUMNS, len(found.space))
    lines = -(-len(found.space) // columns)
    look, drawn = looks(results)[found.name], scale(results)
    traces: list[Trace] = []
    layout: dict[str, Any] = {"shapes": []}
    for place, (name, space) in enumerate(found.space.items()):
        line, column = divmod(place, columns)
        number = "" if place == 0 else str(place + 1)
        here = {"xaxis": f"x{number}", "yaxis": f"y{number}"}
        traces += [trace | here for trace in trials(found, name, look, drawn)]
        layout[f"xaxis{number}"] = across(name, space) | {"domain": cell(column, columns, GAP), "anchor": here["yaxis"]}
        layout[f"yaxis{number}"] = drawn.axis() | {
            "domain": cell(lines - 1 - line, lines, GAP * 2),
            "anchor": here["xaxis"],
        }
        if all(run.loss is None or run.diverged for run in found.trials):  # crosses alone stand at no loss
            layout[f"yaxis{number}"] |= {"showticklabels": False, "title": None}
        if place:
            layout[f"yaxis{number}"] |= {"matches": "y"} | ({"title": None, "showticklabels": False} if column else {})
        where = {"xref": here["xaxis"], "yref": f"{here['yaxis']} domain"}
        layout["shapes"] += [shape | where for shape in ends(space, found.widened.get(name))]
    return figure(traces, PANEL * lines + 20, showlegend=False, **layout)


def cell(place: int, of: int, gap: float) -> list[float]:
    """The share of the width, or of the height, that a panel takes."""
    width = (1 - gap * (of - 1)) / of
    return [place * (width + gap), min(1.0, place * (width + gap) + width)]


def trials(found: MethodResult, name: str, look: Look, drawn: Scale) -> list[Trace]:
    """Trials that finished, those that diverged, and the choice."""
    healthy = [run for run in found.trials if run.loss is not None and not run.diverged]
    fallen = [run for run in found.trials if run not in healthy]
    heights = {run.number: drawn(run.loss) for run in healthy if run.loss is not None}
    top = ceiling(list(heights.values()), drawn)
    cross = {"symbol": "x-thin-open", "size": 9, "color": look.colour, "line": {"width": 2}}
    ring = {"symbol": "circle-open", "size": 17, "color": INK[0], "line": {"width": 1.5}}
    groups = [
        (healthy, {"symbol": look.symbol, "size": 8, "color": look.colour}),
        (fallen, cross),
        ([run for run in healthy if run.number == found.best], ring),
    ]
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "x": [place(run.hyper.get(name), found.space[name]) for run in runs],
            "y": [heights.get(run.number, top) for run in runs],
            "name": label(found.name),
            "marker": marker,
            "cliponaxis": False,
            "customdata": [told(run) for run in runs],
            "hovertemplate": "<b>%{fullData.name}</b><br>%{customdata}<extra></extra>",
        }
        for runs, marker in groups
        if runs
    ]


def told(run: Run) -> str:
    """A trial in words."""
    loss = "not finite" if run.loss is None else f"{run.loss:.5g}"
    end = f"{'diverged, ' if run.diverged or run.loss is None else ''}loss {loss}"
    return "<br>".join([f"trial {run.number}: {end}", *(f"{label(k)} {label(setting(v))}" for k, v in run.hyper.items())])


def ceiling(heights: Sequence[float], drawn: Scale) -> float:
    """Where diverged trials stand: a little above the highest of the others."""
    if not heights:
        return 1.0
    low, high = min(heights), max(heights)
    if drawn.optimum is not None:
        return 1.5 * high * (high / low) ** ROOM
    return high + ((high - low) or abs(high) or 1.0) * ROOM


def across(name: str, space: Mapping[str, Any]) -> dict[str, Any]:
    """A hyper-parameter's axis, on the scale it was drawn on."""
    if space["kind"] == "choice":
        return axis(label(name), type="category", categoryarray=[place(v, space) for v in space["options"]])
    return (log_axis if space["kind"] == "log_uniform" else axis)(label(name))


def place(value: Any, space: Mapping[str, Any]) -> Any:
    """A value on that axis."""
    return label(str(value)) if space["kind"] == "choice" else value


def ends(space: Mapping[str, Any], widened: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Both ends of the space, and the field it was widened to."""
    if space["kind"] == "choice":
        return []
    line = {"color": QUIET[0], "width": 1}
    shapes: list[dict[str, Any]] = [
        {"type": "line", "x0": space[end], "x1": space[end], "y0": 0, "y1": 1, "line": line} for end in ("low", "high")
    ]
    if widened is not None:
        low, high = widened["low"], widened["high"]
        field = {"x0": low, "x1": high, "y0": 0, "y1": 1, "fillcolor": QUIET[0], "opacity": 0.14, "line": {"width": 0}}
        shapes.insert(0, {"type": "rect", "layer": "below"} | field)
    return shapes
