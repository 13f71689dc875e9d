"""One sign for each entry, by vote of the models, and the average of those who agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Disjoint = Literal["mean", "sum", "max"]


def votes(deltas: Sequence[Tensor], factors: Sequence[Tensor]) -> Tensor:
    """sum_i f_i tau_i, in float64."""
    total = torch.zeros_like(deltas[0], dtype=torch.float64)
    for delta, factor in zip(deltas, factors, strict=True):
        total += factor * delta
    return total


def agreeing(
    deltas: Sequence[Tensor], factors: Sequence[Tensor], weights: Sequence[float], majority: int, disjoint: Disjoint = "mean"
) -> list[Tensor]:
    """The coefficient of each model's tau in the average of those entries whose sign is the elected one.

        gamma = sign(sum_i f_i tau_i), or `majority` where that is 0;   a_i = 1 where sign(f_i tau_i) = gamma, else 0

        mean:  a_i f_i / sum_j a_j w_j       sum:  a_i f_i       max:  f_i for the first i with the largest a_i |f_i tau_i|

    Args:
        factors: what each tau comes with: its weight, 0 where it was dropped, its rescaling. float64.
        weights: that the mean divides by; of equal weights 1, this is the number of those who agree.
    """
    if disjoint not in get_args(Disjoint):
        raise ValueError(f"disjoint={disjoint!r}: must be one of {', '.join(map(repr, get_args(Disjoint)))}")
    total = votes(deltas, factors)
    elected = torch.where(total == 0, majority, total.sign())
    sides = [(f * d).sign() for f, d in zip(factors, deltas, strict=True)]
    agree = [(side == elected) & (side != 0) for side in sides]
    if disjoint == "mean":
        divisor = torch.zeros_like(total)
        for a, w in zip(agree, weights, strict=True):
            divisor.add_(a, alpha=w)
        divisor = torch.where(divisor == 0, 1, divisor)
        return [torch.where(a, f / divisor, 0) for a, f in zip(agree, factors, strict=True)]
    if disjoint == "max":
        sizes = torch.stack([(f * d).abs() * a for f, d, a in zip(factors, deltas, agree, strict=True)])
        first = sizes.argmax(0)
        agree = [a & (first == i) for i, a in enumerate(agree)]
    return [torch.where(a, f, 0) for a, f in zip(agree, factors, strict=True)]


def sign(number: int) -> int:
    return (number > 0) - (number < 0)
