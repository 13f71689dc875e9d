"""Clipping by global norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from poise.catalog import Paper, method

from ..transform import Context, Param, Slot, State, Transform


@method(
    "clip",
    family="optim",
    kind="transform",
    paper=Paper("On the difficulty of training Recurrent Neural Networks", arxiv="1211.5063", year=2012),
    mutant=("torch.where(norm > self.max_norm,", "torch.where(norm < self.max_norm,"),
)
class clip(Transform):
    """Scale all gradients together so that their common norm is at most `max_norm`.

    `N = sqrt(sum over all parameters of ||g||^2)`, `u <- u * C / (N + 1e-6)` if `N > C`, else `u` unchanged to the bit.

    The sum runs over every parameter whose rule holds this very object, on all ranks, each element once; so one `clip(1.0)`
    that stands in two chains clips both together. It is taken in float64: in float32 a gradient of 1e20 already overflows it.

    Args:
        max_norm: `C`, positive.
        nonfinite: what to do when N is not finite: "skip" abandons the step, leaving weights and state as they are, and counts
            it (`optimizer.state[first parameter]["skipped"]`); "raise" raises FloatingPointError.
    """

    def __init__(self, max_norm: float = 1.0, nonfinite: Literal["skip", "raise"] = "skip") -> None:
        if not max_norm > 0:
            raise ValueError(f"max_norm={max_norm}: must be positive")
        if nonfinite not in ("skip", "raise"):
            raise ValueError(f"nonfinite={nonfinite!r}: must be 'skip' or 'raise'")
        self.max_norm, self.nonfinite = max_norm, nonfinite

    def slots(self, p: Param) -> dict[str, Slot]:
        return {"skipped": Slot((), dtype=torch.int64, kind="exact", shared=True)}

    def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float]:
        return {}

    def measure(self, u: Tensor, state: State, x: Tensor, k: Context) -> dict[str, Tensor]:
        return {"squared": u.double().square().sum()}

    def reduce(self, totals: dict[str, Tensor], shared: State, k: Context) -> dict[str, Tensor]:
        norm = totals["squared"].sqrt()
        bad = ~torch.isfinite(norm)
        if self.nonfinite == "raise" and bool(bad):
            raise FloatingPointError(f"the gradients' global norm is {norm.item()}; nothing was changed")
        shared["skipped"] = shared["skipped"] + bad
        factor = torch.where(norm > self.max_norm, self.max_norm / (norm + 1e-6), torch.ones_like(norm))
        return {"factor": factor, "norm": norm, "skip": bad}

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return u * k.total["factor"]

    def __repr__(self) -> str:
        return f"clip({self.max_norm})"
