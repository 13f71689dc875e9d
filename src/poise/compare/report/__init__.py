"""The HTML report of a comparison: one file that needs nothing else, neither a network nor poise.

from pathlib import Path
from poise.compare import Results, report
report.write(Results.read(Path("results.json")), Path("report.html"))
"""

from __future__ import annotations

from pathlib import Path

from poise.compare import against as beside
from poise.compare.digits import spread
from poise.compare.results import Results, write_whole

from .again import command
from .charts import budgets, frontier
from .curves import curves
from .limits import limits
from .looks import looks
from .pages import Chart, page
from .rows import rows, strips
from .tuning import tuning


def render(results: Results, against: Results | None = None) -> str:
    """`results` as a page, beside `against` where that is given.

    Raises:
        ValueError: if the two are not of the same task and data.
    """
    compared = [] if against is None else beside.set_beside(results, against)
    names = [found.name for found in results.methods]
    scatters = [(found, looks(results)[found.name], tuning(results, found)) for found in results.methods]
    return page(
        "template.html.j2",
        results=results,
        rows=rows(results),
        charts={
            "curves": Chart("curves", f"Training loss by passes of {', '.join(names)}", curves(results, against)),
            "budgets": Chart("budgets", f"Final loss of {results.reference} by budget, and of the others", budgets(results)),
            "frontier": Chart("frontier", "Final loss by bytes of optimizer state", frontier(results)),
        },
        tuned=[
            (found, look, None if drawn is None else Chart(f"tuning-{place}", f"Trials of {found.name}", drawn))
            for place, (found, look, drawn) in enumerate(scatters)
        ],
        limits=limits(results),
        command=command(results),
        against=against,
        compared=[(row, looks(results)[row.name], beside.sentence(row)) for row in compared],
        compared_strips=strips({row.name: row.difference for row in compared}),
        changes=[] if against is None else beside.changes(results, against),
        unshared=((), ()) if against is None else beside.unshared(results, against),
        spread=spread,
    )


def write(results: Results, path: Path, against: Results | None = None) -> None:
    """Write the page to `path`, whole or not at all.

    Raises:
        ValueError: if `results` and `against` are not of the same task and data.
    """
    write_whole(path, render(results, against))
