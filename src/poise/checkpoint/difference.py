"""How far one tensor is from another: read once, a few rows at a time, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .checkpoint import Checkpoint, count_rows
from .statistics import TILE_BYTES


@dataclass(frozen=True)
class Difference:
    """b - a of one tensor, in float64.

    Attributes:
        equal: same dtype and same bytes.
        max_error: largest |b - a|; infinite where one is nan or infinite and the other is not the same.
        relative: `||b - a|| / ||a||`; infinite where a is 0 and b is not.
        cosine: `<a, b> / (||a|| ||b||)`; 1 where both are 0, nan where one is.
        at: index of the largest error, with `a` and `b`, what stands there; None where the tensors are equal.
        new_bad: entries that are nan or infinite in b and finite in a.
    """

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, str]
    equal: bool
    max_error: float
    relative: float
    cosine: float
    at: tuple[int, ...] | None = None
    a: float | None = None
    b: float | None = None
    new_bad: int = 0


def difference(a: Checkpoint, name_a: str, b: Checkpoint, name_b: str, name: str | None = None) -> Difference:
    """b - a of one tensor, read once, a few rows at a time."""
    info, other = a.info(name_a), b.info(name_b)
    rows, width = count_rows(info.shape), max(1, info.numel // max(1, count_rows(info.shape)))
    step = max(1, TILE_BYTES // (8 * width))
    equal, most, at, values, new_bad = info.dtype == other.dtype, 0.0, None, None, 0
    squares_a = squares_b = squares = inner = 0.0
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        left, right = a.rows(name_a, start, stop), b.rows(name_b, start, stop)
        if equal and same_bytes(left, right):
            x = entries(left)
            norm = float(torch.dot(x, x))
            squares_a, squares_b, inner = squares_a + norm, squares_b + norm, inner + norm
            continue
        equal = False
        x, y = entries(left), entries(right)
        gap = (y - x).abs()
        gap[(x == y) | (x.isnan() & y.isnan())] = 0
        gap[gap.isnan()] = math.inf
        new_bad += int((x.isfinite() & ~y.isfinite()).sum())
        if gap.numel() and float(gap.max()) > most:
            most, flat = float(gap.max()), int(gap.argmax())
            values = (float(x[flat]), float(y[flat]))
            flat += start * width * (2 if left.is_complex() else 1)
            at = tuple(int(i) for i in np.unravel_index(flat // (2 if left.is_complex() else 1), tuple(info.shape)))
        squares_a, squares_b = squares_a + float(torch.dot(x, x)), squares_b + float(torch.dot(y, y))
        squares, inner = squares + float(torch.dot(gap, gap)), inner + float(torch.dot(x, y))
    lengths = math.sqrt(squares_a) * math.sqrt(squares_b)
    return Difference(
        name or name_a,
        tuple(info.shape),
        (str(info.dtype).removeprefix("torch."), str(other.dtype).removeprefix("torch.")),
        equal,
        most,
        math.sqrt(squares / squares_a) if squares_a else (0.0 if squares == 0 else math.inf),
        max(-1.0, min(1.0, inner / lengths)) if lengths else (1.0 if squares_a == squares_b else math.nan),
        at,
        None if values is None else values[0],
        None if values is None else values[1],
        new_bad,
    )


def entries(rows: Tensor) -> Tensor:
    """All numbers of a few rows, in float64; of complex ones real and imaginary parts."""
    return (torch.view_as_real(rows) if rows.is_complex() else rows).reshape(-1).double()


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))
