"""A study of fusions: two fine-tunings of one start, merged, all of them measured alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from poise.catalog import Paper, method

from ..protocol import merge_tensors
from .linear import linear
from .slerp import slerp

Rule = Literal["linear", "slerp"]
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Measurement:
    """One line of the report: a model's name, the share of the second parent in it (None for the start), its score."""

    name: str
    coefficient: float | None
    score: float


@dataclass(frozen=True)
class FusionReport:
    """Start, both parents and every fusion, on one score."""

    rows: tuple[Measurement, ...]
    higher_is_better: bool

    @property
    def best(self) -> Measurement:
        return (max if self.higher_is_better else min)(self.rows, key=lambda row: row.score)

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.rows)
        lines = [f"{'model':{width}}  coefficient  score"]
        for row in self.rows:
            share = "-" if row.coefficient is None else f"{row.coefficient:.2f}"
            lines.append(f"{row.name:{width}}  {share:>11}  {row.score:.4f}{'  best' if row is self.best else ''}")
        return "\n".join(lines)


@method(
    "fusion_study",
    family="merge",
    kind="protocol",
    paper=Paper("A Post-Training Enhanced Optimization Approach for Small Language Models", arxiv="2411.02939", year=2024),
    mutant=("weight=(1 - c, c)", "weight=(c, 1 - c)"),
)
def fusion_study(
    start: Weights,
    first: Weights,
    second: Weights,
    score: Callable[[Weights], float],
    *,
    names: tuple[str, str] = ("first", "second"),
    rules: Sequence[Rule] = ("linear", "slerp"),
    coefficients: Sequence[float] = (0.25, 0.5, 0.75),
    higher_is_better: bool = False,
) -> FusionReport:
    """Measures two variants of one model, the start they came from, and their fusions.

        linear: (1 - c) theta_1 + c theta_2;    slerp: the same on the sphere, tensor by tensor

    Args:
        start, first, second: weights; the start is measured and not merged.
        score: of weights, on data that trained none of them.
        names: of the parents, in the report.
        rules: which fusions.
        coefficients: c; 0 and 1 are the parents, bit for bit.
        higher_is_better: of the score; off, as for a loss.

    Raises:
        ValueError: an unknown rule.

    The paper trains two variants of a small model, by supervised fine-tuning and by preferences, and fuses them; its fusion
    rule and coefficients are not known. Source: "A Post-Training Enhanced Optimization Approach for Small Language Models"
    (arXiv 2411.02939).
    """
    if unknown := [rule for rule in rules if rule not in get_args(Rule)]:
        raise ValueError(f"rules: {unknown[0]!r} is unknown; known: {', '.join(get_args(Rule))}")
    rows = [Measurement("start", None, score(start))]
    rows += [Measurement(names[0], 0.0, score(first)), Measurement(names[1], 1.0, score(second))]
    for rule in rules:
        for c in coefficients:
            rows.append(Measurement(rule, c, score(fused(first, second, rule, c))))
    return FusionReport(tuple(rows), higher_is_better)


def fused(first: Weights, second: Weights, rule: Rule, c: float) -> dict[str, Tensor]:
    """Two models fused with the share c of the second."""
    if rule == "linear":
        return merge_tensors(linear, [first, second], weight=(1 - c, c))
    return merge_tensors(slerp, [first, second], t=c)
