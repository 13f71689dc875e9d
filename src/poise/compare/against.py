"""Two finished comparisons of one task side by side: yesterday's code and today's, one machine and another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, variance
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from scipy.special import stdtrit

from poise.compare.digits import spread
from poise.compare.results import Interval, MethodResult, Results
from poise.compare.statistics import CONFIDENCE, may_be_luck, paired


class Row(NamedTuple):
    """One entry that stands in both."""

    name: str
    ours: Interval | None  # final loss; None: it diverged on a seed
    theirs: Interval | None
    difference: Interval | None  # ours minus theirs: negative where ours is better
    paired: bool  # seed by seed; otherwise Welch's interval of two independent means

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {name: value.model_dump() if isinstance(value, Interval) else value for name, value in self._asdict().items()}

    @property
    def tie(self) -> bool:
        """Whether the runs leave room for no difference."""
        return may_be_luck(self.difference)


def set_beside(ours: Results, theirs: Results) -> list[Row]:
    """The entries that both have, in the order of `ours`.

    Differences are taken seed by seed where both ran the same seeds, and then what a seed does to both cancels.

    Raises:
        ValueError: if they are not of the same task and data.
    """
    for what in ("task", "fingerprint"):
        mine, other = getattr(ours, what), getattr(theirs, what)
        if mine != other:
            raise ValueError(f"the two comparisons cannot be laid side by side: {what} is {mine!r} here and {other!r} there")
    others = {found.name: found for found in theirs.methods}
    rows = []
    for mine in ours.methods:
        if (other := others.get(mine.name)) is not None:
            pairs = ours.settings.seed == theirs.settings.seed and seeds(mine) == seeds(other) != []
            difference = paired(losses(mine), losses(other)) if pairs else welch(losses(mine), losses(other))
            rows.append(Row(mine.name, mine.final, other.final, difference, pairs))
    return rows


def seeds(found: MethodResult) -> list[int]:
    """What the final runs hang on."""
    return [run.seed for run in found.finals]


def losses(found: MethodResult) -> list[float | None]:
    """Final losses by seed; None where the run diverged."""
    return [run.loss for run in found.finals]


def welch(ours: Sequence[float | None], theirs: Sequence[float | None]) -> Interval | None:
    """Difference of two independent means -+ t_v sqrt(s1^2/n1 + s2^2/n2), v the degrees of freedom of Welch and Satterthwaite.

    None if a value is missing. Without bounds if there are not two of each.
    """
    known = [[value for value in values if value is not None] for values in (ours, theirs)]
    if not all(known) or len(known[0]) < len(ours) or len(known[1]) < len(theirs):
        return None
    mean = fmean(known[0]) - fmean(known[1])
    if min(map(len, known)) < 2:
        return Interval(mean=mean, low=None, high=None)
    parts = [variance(values) / len(values) for values in known]
    if sum(parts) == 0:
        return Interval(mean=mean, low=mean, high=mean)
    freedom = sum(parts) ** 2 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, known, strict=True))
    half = float(stdtrit(freedom, 0.5 + CONFIDENCE / 2)) * math.sqrt(sum(parts))
    return Interval(mean=mean, low=mean - half, high=mean + half)


def changes(ours: Results, theirs: Results) -> list[tuple[str, Any, Any]]:
    """What was set, or ran, differently: name, here, there."""
    found = []
    for part in ("settings", "environment"):
        mine, other = (flat(getattr(results, part)) for results in (ours, theirs))
        names = [*mine, *(name for name in other if name not in mine)]
        found += [(name, mine.get(name), other.get(name)) for name in names if mine.get(name) != other.get(name)]
    return found


def flat(part: Any) -> dict[str, Any]:
    """Settings or environment by name."""
    return part if isinstance(part, dict) else part.model_dump()


def unshared(ours: Results, theirs: Results) -> tuple[list[str], list[str]]:
    """Entries that only one has: here, there."""
    mine, others = ([found.name for found in results.methods] for results in (ours, theirs))
    return [name for name in mine if name not in others], [name for name in others if name not in mine]


def sentence(row: Row) -> str:
    """A row's outcome in words."""
    if row.ours is None or row.theirs is None:
        gone = [where for where, value in (("here", row.ours), ("there", row.theirs)) if value is None]
        return f"diverged {' and '.join(gone)}"
    if row.tie or row.difference is None:
        return "no difference shown"
    return "better here" if row.difference.mean < 0 else "better there"


def table(ours: Results, theirs: Results) -> RenderableType:
    """Both side by side for the terminal.

    Raises:
        ValueError: if they are not of the same task and data.
    """
    rows = set_beside(ours, theirs)
    how = {True: "seed by seed", False: "as independent means"}
    shown = Table(title=f"{ours.task}: final loss here and there", caption="95 % intervals of the difference")
    shown.add_column("method", no_wrap=True)
    for column in ("here", "there", "here minus there"):
        shown.add_column(column, justify="right", no_wrap=True)
    shown.add_column("compared")
    shown.add_column("")
    for row in rows:
        difference = "" if row.difference is None else spread(row.difference, sign="+")
        shown.add_row(Text(row.name), spread(row.ours), spread(row.theirs), difference, how[row.paired], sentence(row))
    lines = [f"{name}: {here} here, {there} there" for name, here, there in changes(ours, theirs)]
    here, there = unshared(ours, theirs)
    lines += [f"only {where}: {', '.join(names)}" for where, names in (("here", here), ("there", there)) if names]
    return Group(shown, *map(Text, lines))
