"""The page of `poise inspect`: one file that needs nothing else, neither a network nor poise.

from poise.checkpoint.inspecting import inspect
inspection.write(inspect(checkpoint, spectra=True), Path("model.html"))
"""

from __future__ import annotations

from pathlib import Path

from poise.checkpoint.inspecting import Inspection
from poise.compare.report.pages import Chart, page
from poise.compare.results import write_whole

from .depth import over_depth
from .entries import entries
from .roles import looks
from .spectra import spectra
from .words import facts, rows, sentence, totals

ROWS = 2000  # of the table; a browser draws more, but slowly, and JSON has them all


def render(found: Inspection) -> str:
    """The page."""
    seen = looks(found)
    drawn = [
        Chart("norms", "Frobenius norm of every matrix by layer", over_depth(found, "norm")),
        Chart("sizes", "Root mean square of every matrix by layer", over_depth(found, "rms")),
        Chart("outliers", "Largest entry over the root mean square by layer", over_depth(found, "largest")),
        Chart("entries", "Histograms of the entries by role", entries(found)),
        Chart("spectra", "Singular values of matrices by role", spectra(found)),
        Chart("ranks", "Stable rank of every matrix by layer", over_depth(found, "stable_rank")),
        Chart("conditions", "Condition number of every matrix by layer", over_depth(found, "condition")),
    ]
    return page(
        "inspection.html.j2",
        found=found,
        name=found.path or "weights in memory",
        sentence=sentence(found),
        facts=facts(found),
        charts={chart.id: chart for chart in drawn if chart.figure["data"]},
        totals=totals(found),
        looks=seen,
        rows=rows(found)[:ROWS],
        spectral=any(tensor.spectrum is not None for tensor in found.tensors),
    )


def write(found: Inspection, path: Path) -> None:
    """Write the page to `path`, whole or not at all."""
    write_whole(path, render(found))
