"""The loss axis: the loss itself, or where the task knows its optimum, the logarithm of what it is above it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from poise.compare.results import Results

from .looks import axis, label, log_axis


@dataclass(frozen=True)
class Scale:
    """Where a loss is drawn."""

    unit: str
    optimum: float | None
    floor: float  # stands for an excess of zero, which has no logarithm: the optimum reached to rounding, or a lucky batch

    def __call__(self, loss: float) -> float:
        return loss if self.optimum is None else max(loss - self.optimum, self.floor)

    def axis(self) -> dict[str, Any]:
        """The axis of such numbers."""
        unit = f", {label(self.unit)}" if self.unit else ""
        if self.optimum is None:
            return axis(f"loss{unit}")
        return log_axis(f"loss above the optimum{unit} (logarithmic)")


def scale(results: Results) -> Scale:
    """The scale of everything in `results`; the floor lies below every excess there is."""
    optimum = results.optimum
    above = [loss - optimum for loss in losses(results) if loss > optimum] if optimum is not None else []
    return Scale(results.unit, optimum, min(above, default=1.0) / 2)


def losses(results: Results) -> Iterator[float]:
    """Every loss that a chart may draw."""
    runs = [run for found in results.methods for run in (*found.trials, *found.finals)]
    for run in runs + [run for point in results.budgets for run in point.runs]:
        if run.loss is not None:
            yield run.loss
        yield from (loss for _, loss in run.curve)
