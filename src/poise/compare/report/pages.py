"""What all pages share: their frame, their charts, and plotly.js in them, so that a page needs nothing but a browser."""

from __future__ import annotations

from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from .looks import HUES, INK, PAGE, QUIET, RULE, THEMES, Figure

PAGES = Environment(
    loader=PackageLoader("poise.compare.report", "."),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


class Chart(NamedTuple):
    """A figure in the page."""

    id: str
    says: str  # what it shows, for who cannot see it
    figure: Figure


def page(template: str, **content: Any) -> str:
    """A page that extends `base.html.j2`."""
    colours = dict(themes=THEMES, hues=HUES, page=PAGE, ink=INK, quiet=QUIET, rule=RULE)
    return PAGES.get_template(template).render(**content, **colours, plotly=get_plotlyjs())
