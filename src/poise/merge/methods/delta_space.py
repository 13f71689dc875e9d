"""Delta-space merge: two updates of one base added up, and how much they overlap."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from poise.catalog import Paper, method, uniform

from ..protocol import wide
from ..task_vectors import combined, needed

PAPER = Paper("Unlocking Complex Visual Generation via Closed-Loop Verified Reasoning", arxiv="2605.14876", year=2026)


@method(
    "delta_space",
    family="merge",
    kind="merge",
    paper=PAPER,
    tune={"a": uniform(0.0, 1.0), "b": uniform(0.0, 1.0)},
    mutant=("[a, b][: len(tensors)]", "[a / 2, b / 2][: len(tensors)]"),
)
def delta_space(tensors: list[Tensor], base: Tensor | None = None, *, a: float = 1.0, b: float = 1.0) -> Tensor:
    """Two updates of one base, both in full: an alignment and a distillation, say.

        theta = theta_0 + a (theta_1 - theta_0) + b (theta_2 - theta_0)

    It is task arithmetic of two, with no conflict rule: right as long as both updates are small and act on different inputs,
    which `overlap` measures. An update that is itself a sum, of a fine-tuning and a LoRA, is `fold_lora` of the first.

    Args:
        base: theta_0.
        a, b: 1. (1, 0) and (0, 1) give the models bit for bit.

    Raises:
        ValueError: no base; more than two models.

    What is not finite is so in the result too. Source: "Unlocking Complex Visual Generation via Closed-Loop Verified Reasoning"
    (arXiv 2605.14876).
    """
    base = needed(base, "delta_space")
    if len(tensors) > 2:
        raise ValueError(f"delta_space: takes two models, these are {len(tensors)}; task_arithmetic takes any number")
    return combined(tensors, [a, b][: len(tensors)], base)


@dataclass(frozen=True)
class Overlap:
    """Of one tensor, or of the whole model.

    Attributes:
        first, second: |update| / |base|, 0 where both are zero.
        cosine: between the updates; 0 where one is zero.
    """

    name: str
    first: float
    second: float
    cosine: float


@method(
    "delta_overlap",
    family="merge",
    kind="diagnostic",
    paper=PAPER,
    mutant=("parts[1] @ parts[2]", "parts[1].abs() @ parts[2].abs()"),
)
def overlap(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> tuple[Overlap, list[Overlap]]:
    """How large two updates of a base are, and how nearly they point the same way: of the whole model, and of each tensor.

        |theta_1 - theta_0| / |theta_0|,    |theta_2 - theta_0| / |theta_0|
        <theta_1 - theta_0, theta_2 - theta_0> / (|theta_1 - theta_0| |theta_2 - theta_0|)

    The merge is right to first order where the first two are some hundredths, and keeps both behaviours where the cosine is
    near zero. One tensor of each model is read at a time.

    Raises:
        KeyError: a tensor of the base is missing in a model.
    """
    rows, total = [], [0.0] * 4
    for name in sorted(base):
        root = base[name]
        if not root.is_floating_point():
            continue
        parts = [t.double().reshape(-1) for t in (wide(root), wide(first[name]) - wide(root), wide(second[name]) - wide(root))]
        sums = [*(float(p @ p) for p in parts), float(parts[1] @ parts[2])]
        total = [a + b for a, b in zip(total, sums, strict=True)]
        rows.append(_row(name, sums))
    return _row("model", total), rows


def _row(name: str, sums: Sequence[float]) -> Overlap:
    base, one, two = (math.sqrt(s) for s in sums[:3])

    def part(size: float) -> float:
        return size / base if base > 0 else math.inf if size > 0 else 0.0

    return Overlap(name, part(one), part(two), sums[3] / (one * two) if one * two > 0 else 0.0)


@dataclass(frozen=True)
class LoRA:
    """An update `scale * B @ A` of a matrix.

    Attributes:
        A: (r, d_in).
        B: (d_out, r).
        scale: alpha / r.
    """

    A: Tensor
    B: Tensor
    scale: float = 1.0

    def dense(self) -> Tensor:
        """The update as a matrix, in float64."""
        return self.scale * (self.B.double() @ self.A.double())


def concatenate(updates: Sequence[LoRA], weights: Sequence[float] | None = None) -> LoRA:
    """The weighted sum of low-rank updates as one, whose rank is the sum of theirs: nothing dense is made, nothing is lost.

        sum_i c_i s_i B_i A_i = [c_1 s_1 B_1, c_2 s_2 B_2, ...] [A_1; A_2; ...]

    Raises:
        ValueError: none is given, or their shapes do not fit.
    """
    if not updates:
        raise ValueError("updates: at least one is needed")
    weights = [1.0] * len(updates) if weights is None else list(weights)
    for one in updates:
        shape = (one.B.shape[0], one.A.shape[1])
        if one.A.shape[0] != one.B.shape[1] or shape != (updates[0].B.shape[0], updates[0].A.shape[1]):
            raise ValueError(
                f"updates: A is {tuple(one.A.shape)} and B {tuple(one.B.shape)}, which fits no {shape} like the first"
            )
    scaled = [c * one.scale * one.B for c, one in zip(weights, updates, strict=True)]
    return LoRA(torch.cat([one.A for one in updates]), torch.cat(scaled, 1), 1.0)


def fold_lora(weight: Tensor, update: LoRA) -> Tensor:
    """`weight` with the update in it, in its own dtype; added in float64 and rounded once."""
    return (weight.double() + update.dense()).to(weight.dtype)
