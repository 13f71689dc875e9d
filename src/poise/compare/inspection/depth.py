"""A number of every matrix against the layer that it lies in."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

from poise.checkpoint.inspecting import Inspection, Tensor
from poise.compare.report.looks import Figure, Trace, axis, figure, label, log_axis

from .roles import drawn, looks

TITLES = {
    "norm": "Frobenius norm",
    "rms": "root mean square",
    "largest": "largest |entry| / RMS",
    "stable_rank": "stable rank",
    "condition": "condition number",
}


def value(tensor: Tensor, what: str) -> float | None:
    """A finite, positive number to draw, or none."""
    source: Any = tensor.statistics if what in ("norm", "rms", "largest") else tensor.spectrum
    found = None if source is None else getattr(source, what)
    return found if found is not None and math.isfinite(found) and found > 0 else None


def over_depth(found: Inspection, what: str) -> Figure:
    """One line for each role in each stack of layers, and one point for each tensor outside of layers, left or right of them.

    Where several tensors of one role share a layer, as experts do, all are drawn and the line goes through their mean.
    """
    seen = looks(found)
    points: dict[tuple[str, str | None], list[tuple[int, float, str]]] = defaultdict(list)
    for tensor in found.tensors:
        height = value(tensor, what) if drawn(tensor) else None
        if height is not None:
            described = tensor.described
            points[described.role, described.stack].append((described.layer or 0, height, tensor.name))
    stacks = list(found.structure.stacks)
    deepest = max((layer for (_, stack), some in points.items() if stack is not None for layer, _, _ in some), default=0)
    traces: list[Trace] = []
    named: set[str] = set()
    for (role, stack), some in sorted(points.items(), key=lambda item: list(seen).index(item[0][0])):
        look = seen[role]
        common: dict[str, Any] = {
            "type": "scatter",
            "name": label(role),
            "legendgroup": role,
            "hovertemplate": f"%{{text}}<br>{TITLES[what]} %{{y:.4g}}<extra></extra>",
            "marker": {"color": look.colour, "symbol": look.symbol, "size": 7},
        }
        if stack is None:
            side = deepest + 1 if role == "head" else -1
            x = [side] * len(some)
            trace = common | {"mode": "markers", "x": x}
        else:
            some = sorted(some)
            dash = ("solid", "dot", "dashdot", "dash")[stacks.index(stack) % 4]
            alone = len({layer for layer, _, _ in some}) == len(some)
            mode = "lines+markers" if alone else "markers"
            line = {"color": look.colour, "width": 1.6, "dash": dash}
            trace = common | {"mode": mode, "x": [layer for layer, _, _ in some], "line": line}
            if not alone:
                traces.append(mean_line(some, common | {"line": line, "showlegend": False}))
        traces.append(
            trace | {"y": [y for _, y, _ in some], "text": [label(n) for _, _, n in some], "showlegend": role not in named}
        )
        named.add(role)
    layers = list(range(deepest + 1))
    step = max(1, math.ceil(len(layers) / 16))
    ticks = [-1, *layers[::step], deepest + 1]
    texts = ["before", *map(str, layers[::step]), "after"]
    across = axis("layer", tickvals=ticks, ticktext=texts, range=[-1.6, deepest + 1.6])
    return figure(traces, 400, xaxis=across, yaxis=vertical(what, traces))


def vertical(what: str, traces: list[Trace]) -> dict[str, Any]:
    """A logarithmic axis where the numbers spread over more than a factor of ten."""
    heights = [y for trace in traces for y in trace["y"]]
    if heights and max(heights) > 10 * min(heights):
        return log_axis(f"{TITLES[what]} (logarithmic)")
    return axis(TITLES[what], rangemode="tozero")


def mean_line(some: list[tuple[int, float, str]], common: dict[str, Any]) -> Trace:
    by: dict[int, list[float]] = defaultdict(list)
    for layer, y, _ in some:
        by[layer].append(y)
    means = [sum(ys) / len(ys) for ys in by.values()]
    return common | {"mode": "lines", "x": list(by), "y": means, "hoverinfo": "skip", "hovertemplate": None}
