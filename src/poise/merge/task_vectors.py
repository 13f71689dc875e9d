"""What a fine-tuning did to a model, as a vector; and sums of such vectors, put so that the trivial ones are exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def each(value: T | Sequence[T], count: int, name: str) -> tuple[T, ...]:
    """A setting's value for each of `count` models, one that is not given for each being everyone's."""
    if not isinstance(value, list | tuple):
        return (value,) * count  # pyright: ignore[reportReturnType]
    if len(value) != count:
        raise ValueError(f"{name}={tuple(value)}: {len(value)} values for {count} models; there must be one, or one for each")
    return tuple(value)


def needed(base: Tensor | None, method: str) -> Tensor:
    if base is None:
        raise ValueError(f"{method}: a base model is needed, from which the others were fine-tuned")
    return base


def deltas(tensors: Sequence[Tensor], base: Tensor) -> list[Tensor]:
    """tau_i = theta_i - theta_0."""
    return [t - base for t in tensors]


def combined(tensors: Sequence[Tensor], coefficients: Sequence[float | Tensor], base: Tensor | None = None) -> Tensor:
    """sum_i c_i theta_i; with a base, theta_0 + sum_i c_i (theta_i - theta_0). In float64, rounded once.

    The latter is taken as (1 - sum_i c_i) theta_0 + sum_i c_i theta_i. A single c of 1 then gives that model bit for bit, and
    equal models themselves; theta_0 + (theta_1 - theta_0) would not give theta_1. What has the number 0 for a coefficient is
    not looked at, be it NaN.
    """
    parts = list(zip(tensors, coefficients, strict=True))
    if base is not None:
        parts.append((base, _rest(coefficients)))
    total = torch.zeros_like(parts[0][0], dtype=torch.float64)
    for t, c in parts:
        if isinstance(c, Tensor):
            total += c * t
        elif c != 0:
            total.add_(t, alpha=c)
    return total.to(reduce(torch.promote_types, (t.dtype for t, _ in parts)))


def _rest(coefficients: Sequence[Any]) -> float | Tensor:
    if all(not isinstance(c, Tensor) for c in coefficients):
        return math.fsum([1.0, *(-c for c in coefficients)])
    return 1 - sum(c.double() if isinstance(c, Tensor) else c for c in coefficients)


def normalized(weights: Sequence[float], method: str) -> list[float]:
    """Weights divided by their sum.

    Raises:
        ValueError: they sum to zero.
    """
    total = math.fsum(weights)
    if total == 0:
        raise ValueError(f"{method}: the weights {tuple(weights)} sum to 0; give others, or normalize=False")
    return [w / total for w in weights]
