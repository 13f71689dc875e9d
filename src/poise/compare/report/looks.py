"""How a report looks: one colour and one symbol for each entry, in every chart, and what all charts share."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

from poise.compare.results import Results

# As plotly.js takes them. Plotly's Python classes check every property of every trace: longer work than all else in a report.
Trace = dict[str, Any]
Figure = dict[str, Any]

# Each hue on a dark and on a light page: those of Okabe and Ito (Color Universal Design, 2008), made lighter or darker until
# each stands out from its page at 3 to 1, and from the others to people with any of the common colour blindnesses.
HUES = [
    ("#d3dae2", "#30373f"),
    ("#56b4e9", "#0078b8"),
    ("#e69f00", "#c47f00"),
    ("#17a57c", "#008a64"),
    ("#e58ac0", "#c45c99"),
    ("#d5561c", "#cf3f0a"),
    ("#f0e442", "#5c4d12"),
    ("#7f7cf0", "#3f3fae"),
]
SYMBOLS = ["circle", "square", "diamond", "triangle-up", "pentagon", "star", "hexagon", "triangle-down", "bowtie", "hourglass"]
PAGE, INK, QUIET, RULE = ("#12161b", "#fbfbf9"), ("#dde3ea", "#1b2026"), ("#8d98a5", "#5c6773"), ("#29313a", "#dfe2e3")
THEMES = [*HUES, PAGE, INK, QUIET, RULE]
BAND = "2e"  # alpha of a band between seeds
DASHES = ["solid", "dot", "dashdot"]  # "dash" is for another study's line
LONGEST = 40  # letters of a name in a chart; the table has all of them


@dataclass(frozen=True)
class Look:
    """What an entry is drawn with. `index` is that of its hue in `HUES`."""

    index: int
    symbol: str
    dash: str

    @property
    def colour(self) -> str:
        """On the dark page; the page itself swaps it for the light one."""
        return HUES[self.index][0]


def looks(results: Results) -> dict[str, Look]:
    """The look of every entry. Where there are more entries than hues, those that share a hue differ in symbol and line."""
    found = {}
    for place, method in enumerate(results.methods):
        turn, index = divmod(place, len(HUES))
        found[method.name] = Look(index, SYMBOLS[place % len(SYMBOLS)], DASHES[turn % len(DASHES)])
    return found


def label(text: str) -> str:
    """`text` for a chart: plotly reads tags and templates in it, and a very long name would push the chart off the page."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST - 13]}…{text[-12:]}"
    return html.escape(text).replace("{", "&#123;")


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis, its numbers and its title in the quiet ink."""
    return {
        "title": {"text": title, "font": {"size": 12}, "standoff": 8},
        "gridcolor": RULE[0],
        "linecolor": RULE[0],
        "zeroline": False,
        "automargin": True,
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": RULE[0],
    } | more


def log_axis(title: str, **more: Any) -> dict[str, Any]:
    """A logarithmic axis, labelled at the powers of ten."""
    return axis(title, type="log", **({"dtick": 1, "exponentformat": "power", "tickfont": {"size": 10}} | more))


def figure(traces: list[Trace], height: int, **layout: Any) -> Figure:
    """`traces` on the page's own ground."""
    shared: dict[str, Any] = {
        "height": height,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "ui-sans-serif, system-ui, sans-serif", "size": 12, "color": QUIET[0]},
        "margin": {"l": 8, "r": 16, "t": 8, "b": 8},
        "hovermode": "closest",
        "hoverlabel": {"font": {"size": 12}, "align": "left"},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"color": INK[0]}},
    }
    return {"data": traces, "layout": shared | layout}
