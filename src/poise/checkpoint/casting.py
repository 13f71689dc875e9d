"""Rows into the bytes that are stored: cast to the stored dtype, and checked, since no one looks at them again."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .errors import CheckpointError
from .planned import Planned

# Scales that are powers of two: neither a sign nor a zero, so that nothing is rounded to them by accident.
EXPONENTS = torch.float8_e8m0fnu

Nonfinite = Callable[[Planned, int, int], bool]


class Caster:
    """Casts rows in one buffer of `nbytes`, which holds until the next call.

    Floating numbers are rounded to the nearest, ties to even. Integers, bools and exponents take only what they hold exactly.

    Args:
        nonfinite: asked when rows [start, stop) hold NaN or infinity: whether that is as it should be. By default it is not.
    """

    def __init__(self, nbytes: int, nonfinite: Nonfinite | None = None) -> None:
        self.buffer = torch.empty(nbytes, dtype=torch.uint8)
        self.nonfinite = nonfinite

    def __call__(self, tensor: Planned, start: int, stop: int, rows: Tensor) -> memoryview:
        """The bytes of rows [start, stop) of `tensor`.

        Raises:
            CheckpointError: NaN or infinity, or values that the stored dtype has no place for.
        """
        rows = rows.detach()
        raw = self.buffer[: rows.numel() * tensor.dtype.itemsize]
        stored = raw.view(tensor.dtype).view(rows.shape)
        if rows.is_complex() and not tensor.dtype.is_complex:
            self._refuse(tensor, "complex", "store it in complex64")
        stored.copy_(rows)
        if tensor.dtype == EXPONENTS or not (tensor.dtype.is_floating_point or tensor.dtype.is_complex):
            if rows.dtype != tensor.dtype and not torch.equal(_comparable(stored.to(rows.dtype)), _comparable(rows)):
                kind, name = (str(dtype).removeprefix("torch.") for dtype in (rows.dtype, tensor.dtype))
                what = f"rows [{start}, {stop}) are {kind} and hold values that {name} does not"
                self._refuse(tensor, what, "hand such tensors through in their own dtype")
        else:
            self._check_range(tensor, start, stop, rows)
        return raw.numpy().data

    def _check_range(self, tensor: Planned, start: int, stop: int, rows: Tensor) -> None:
        """In one pass that keeps nothing: the least and the largest entry say whether all are finite and in range."""
        low, high = _extent(rows)
        if not (math.isfinite(low) and math.isfinite(high)):
            if self.nonfinite is None or not self.nonfinite(tensor, start, stop):
                what = "NaN" if math.isnan(low) else "infinity"
                cure = "look for it in the inputs, poise inspect shows where"
                self._refuse(tensor, f"rows [{start}, {stop}) hold {what}", cure)
            return
        largest = torch.finfo(tensor.dtype).max
        # From half a unit in the last place above the largest number on, rounding to nearest gives infinity.
        half = math.ldexp(torch.finfo(tensor.dtype).eps, math.frexp(largest)[1] - 2)
        worst = low if -low > high else high
        if abs(worst) >= largest + half:
            name = str(tensor.dtype).removeprefix("torch.")
            what = f"rows [{start}, {stop}) hold {worst:.6g}, and the largest number in {name} is {largest:.6g}"
            self._refuse(tensor, what, "store it in bfloat16 or float32")

    def _refuse(self, tensor: Planned, problem: str, cure: str) -> None:
        raise CheckpointError(problem, cure=cure, tensor=tensor.name)


def _extent(rows: Tensor) -> tuple[float, float]:
    """Least and largest entry, of real and imaginary parts alike; NaN for both if there is one."""
    if rows.is_complex():
        rows = torch.view_as_real(rows.resolve_conj())
    elif not rows.is_floating_point() or rows.dtype.itemsize == 1:
        rows = rows.float()  # torch looks for extremes in no narrow float
    low, high = rows.aminmax()
    return float(low), float(high)


def _comparable(rows: Tensor) -> Tensor:
    return rows.float() if rows.dtype.is_floating_point and rows.dtype.itemsize == 1 else rows
