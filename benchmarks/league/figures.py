"""Figures of the league as SVG, drawn by plotly in the machine's own Chromium. They are read on dark and on light pages."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from plotly.offline import get_plotlyjs

from poise.compare.results import Results

from .judging import between, seconds_speedup

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))
from browser import window

INK, RULE, BELOW, ABOVE = "#7d8794", "#7d879440", "#17a57c", "#d5561c"  # legible on both
BOUNDS = {"exact": "circle", "at least": "triangle-right", "at most": "triangle-left"}
WIDTH, ROW, AROUND = 760, 22, 110

# The figure, an SVG file in an address.
DRAW = """
async ({data, layout}) => {
    const made = await Plotly.newPlot("figure", data, layout)
    return Plotly.toImage(made, {format: "svg", width: layout.width, height: layout.height})
}
"""

Figure = dict[str, Any]


def differences(results: Results) -> Figure:
    """Final loss minus the reference's, the best on top; what could be luck is hollow."""
    found = []
    for name in results.verdict.ranking:
        difference, unsure = between(results, name, results.reference)
        if difference is not None and name != results.reference:
            found.append((name, difference.mean, (difference.high or difference.mean) - difference.mean, unsure))
    colours = [INK if abs(mean) <= unsure else BELOW if mean < 0 else ABOVE for _, mean, _, unsure in found]
    marker = {
        "color": colours,
        "size": 9,
        "symbol": ["circle-open" if colour == INK else "circle" for colour in colours],
        "line": {"width": 1.6, "color": colours},
    }
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": [mean for _, mean, _, _ in found],
        "y": [name for name, _, _, _ in found],
        "error_x": {"type": "data", "array": [half for _, _, half, _ in found], "color": INK, "thickness": 1.2, "width": 0},
        "marker": marker,
    }
    title = f"final loss minus {results.reference}'s, {results.unit or 'of the task'}; hollow: a tie"
    return figure([trace], [name for name, *_ in found], {"title": {"text": title}, "zeroline": True, "zerolinecolor": INK})


def speedups(results: Results) -> Figure:
    """How many times fewer passes, and seconds, than the reference needs for the same loss."""
    rows = [found for found in results.methods if found.speedup is not None and found.name != results.reference]
    rows.sort(key=lambda found: -found.speedup.ratio if found.speedup else 0.0)
    passes = [found.speedup.ratio for found in rows if found.speedup]
    seconds = [known[0] if (known := seconds_speedup(results, found)) else None for found in rows]
    names = [found.name for found in rows]
    symbols = [BOUNDS[found.speedup.bound] for found in rows if found.speedup]
    shared = {"type": "scatter", "mode": "markers", "y": names}
    traces = [
        shared | {"x": passes, "name": "in passes", "marker": {"color": BELOW, "size": 9, "symbol": symbols}},
        shared | {"x": seconds, "name": "in seconds", "marker": {"color": "#e69f00", "size": 9, "symbol": "diamond"}},
    ]
    title = f"times as fast as {results.reference} (logarithmic); an arrow: at least, or at most"
    ticks = [0.25, 0.5, 0.75, 1, 1.5, 2, 3]
    axis = {"title": {"text": title}, "type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    return figure(traces, names, axis)


def figure(traces: Sequence[Figure], names: Sequence[str], across: Figure) -> Figure:
    """One row a name, the first on top."""
    grid = {"gridcolor": RULE, "automargin": True}
    layout = {
        "width": WIDTH,
        "height": ROW * len(names) + AROUND,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "sans-serif", "size": 13, "color": INK},
        "margin": {"l": 10, "r": 20, "t": 10, "b": 10},
        "xaxis": {"zeroline": False} | grid | across,
        "yaxis": {"autorange": "reversed", "type": "category"} | grid,
        "legend": {"orientation": "h", "x": 0, "y": 1.01, "yanchor": "bottom"},
        "showlegend": len(traces) > 1,
    }
    return {"data": list(traces), "layout": layout}


def draw(figures: Mapping[str, Figure]) -> dict[str, str]:
    """Each figure as the text of an SVG file.

    Raises:
        ValueError: if there is no Chromium on the path.
    """
    drawn = {}
    with window() as browser:
        page = browser.new_page()
        page.set_content("<div id=figure></div>")
        page.add_script_tag(content=get_plotlyjs())
        for name, one in figures.items():
            address = page.evaluate(DRAW, one)
            drawn[name] = unquote(address.partition(",")[2]) + "\n"
    return drawn
