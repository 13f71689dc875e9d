"""What was found, as a table for a terminal and as a page of the documentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

HEAD = ("method", "reference", "version", "settings", "dtype", "steps", "difference", "bound", "")

INTRODUCTION = """\
# Agreement with reference code

Each line runs a rule of poise and its reference with the same settings, from the same weights, on the same gradients, and gives
the largest difference between their weights: over all entries and steps, `max |w - w'| / max |w' - w'_0|`, relative to how far
the reference moved. Gradients are drawn anew in every step and also depend on the weights, so that an error grows as it does
in training. Weights are matrices higher than wide, wider than high and square, a vector and a convolution, or what of these
the reference takes. Settings that are not named are the same on both sides.

`python benchmarks/agreement.py --official DIR --page docs/agreement.md` makes this page; the README of that folder says where
to get the repositories. A difference above its bound makes the command fail.
"""


ON_PURPOSE = """\
## Other defaults, on purpose

Here poise's defaults are others than the reference's, or it follows the paper where the code does not. How far apart that leads
in as many steps says nothing about which is better.
"""


def text(whole: dict[str, Any]) -> str:
    rows: list[Sequence[str]] = [HEAD]
    for row in whole["rows"]:
        said = row["status"] if row["failed"] is None else f"{row['status']}: {row['failed']}"
        rows.append((
            row["rule"], f"{row['source']} {row['reference']}", row["version"] or "-", row["settings"], row["dtype"],
            str(row["steps"]), number(row["difference"]), number(row["bound"]), said,
        ))  # fmt: skip
    lines = [f"torch {whole['torch']}, backend {whole['backend']}", "", *aligned(rows), ""]
    lines += [f"not run: {row['rule']}, {row['source']}: {row['why']}" for row in whole["absent"]]
    return "\n".join(lines)


def page(whole: dict[str, Any]) -> str:
    found = [row for row in whole["rows"] if row["difference"] is not None]
    lines = [INTRODUCTION, f"Found with torch {whole['torch']} on a CPU, backend `{whole['backend']}`.", ""]
    lines += ["| method | reference | settings | dtype, steps | difference | bound | why |", "|---|---|---|---|---|---|---|"]
    lines += [line(row, number(row["bound"]), why(row)) for row in found if row["bound"] is not None]
    lines += [
        "",
        ON_PURPOSE,
        "| method | reference | settings | dtype, steps | difference | why |",
        "|---|---|---|---|---|---|",
    ]
    lines += [line(row, why(row)) for row in found if row["bound"] is None]
    lines += ["", "## Not run", "", "| method | code | why |", "|---|---|---|"]
    lines += [f"| {row['rule']} | {row['source']} | {row['failed']} |" for row in whole["rows"] if row["difference"] is None]
    lines += [f"| {row['rule']} | {row['source']} | {row['why']} |" for row in whole["absent"]]
    return "\n".join(lines) + "\n"


def line(row: dict[str, Any], *last: str) -> str:
    where = f"{row['source']} {row['version']}, `{row['reference']}`"
    settings = f"`{row['settings']}`" if "=" in row["settings"] else row["settings"]
    cells = (row["rule"], where, settings, f"{row['dtype']}, {row['steps']}", number(row["difference"]), *last)
    return f"| {' | '.join(cells)} |"


def why(row: dict[str, Any]) -> str:
    if row["sensitivity"] is None:
        return row["note"].replace("rounding", "equal bit for bit", 1) if row["difference"] == 0 else row["note"]
    nudge, moved = row["sensitivity"]["nudge"], number(row["sensitivity"]["difference"])
    return f"{row['note']}. With its first gradients off by {nudge:.0e}, the reference comes out {moved} from itself"


def number(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.1e}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(cells[i]) for cells in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in rows]
