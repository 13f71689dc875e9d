"""How entries are spread, by role: histograms in units of each tensor's own root mean square."""

from __future__ import annotations

import math

import numpy as np

from poise.checkpoint.inspecting import Inspection
from poise.checkpoint.statistics import BARS, SPAN
from poise.compare.report.looks import QUIET, Figure, Trace, axis, figure, label, log_axis

from .roles import drawn, looks


def entries(found: Inspection) -> Figure:
    """One line for each role, its tensors weighted by their entries, and a normal distribution beside them."""
    width = 2 * SPAN / BARS
    middles = [-SPAN + width * (bar + 0.5) for bar in range(BARS)]
    traces: list[Trace] = []
    for role, look in looks(found).items():
        some = [t for t in found.tensors if t.described.role == role and drawn(t) and t.statistics.histogram]
        if not some:
            continue
        weights = [tensor.statistics.count for tensor in some]
        shares = np.average([tensor.statistics.histogram for tensor in some], axis=0, weights=weights)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": middles,
                "y": [float(share) / width if share > 0 else None for share in shares],
                "name": label(role),
                "line": {"color": look.colour, "width": 1.6, "dash": look.dash, "shape": "hvh"},
                "hovertemplate": "<b>%{fullData.name}</b><br>%{x:.2f} RMS<br>density %{y:.3g}<extra></extra>",
            }
        )
    if traces:
        normal = [math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in middles]
        line = {"color": QUIET[0], "width": 1, "dash": "dot"}
        traces.append(
            {"type": "scatter", "mode": "lines", "x": middles, "y": normal, "name": "normal", "line": line, "hoverinfo": "skip"}
        )
    across = axis("entry / RMS of its tensor (the outermost bars hold all beyond)", range=[-SPAN, SPAN])
    return figure(traces, 420, xaxis=across, yaxis=log_axis("density (logarithmic)", range=[-9, 0.5]))
