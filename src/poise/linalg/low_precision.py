"""Matrices of 8 or 6 bits with one scale each, and their products.

    codes, scale = quantize(x, "int8")        x is about scale * codes
    y = product(a, b, "int8")                 scale_a scale_b (codes_a codes_b)

| format | codes                                        | scale          | sums of the product              |
|--------|----------------------------------------------|----------------|----------------------------------|
| `int8` | whole numbers, to nearest, int8              | max |x| / 127  | int32, exact                     |
| `fp8`  | e4m3: 4 bits of exponent, 3 of mantissa      | max |x| / 448  | float32                          |
| `fp6`  | e3m2, to nearest, kept as float8_e4m3fn      | max |x| / 28   | float32                          |
| `none` | x itself                                     | 1              | float32, or float64 for float64  |

Everything but `int8` is emulated: codes are exact, products are computed in float32.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .lengths import wide

Precision = Literal["int8", "fp8", "fp6", "none"]
Quantized = tuple[Tensor, Tensor]  # codes, and their scale, 0-d
MAXIMUM = {"int8": 127.0, "fp8": 448.0, "fp6": 28.0}  # the largest code


def quantize(x: Tensor, precision: Precision) -> Quantized:
    """Codes and the scale of x, of any shape. Zeros have scale 1; of what is not finite, the scale is not either."""
    x = wide(x)
    if precision == "none":
        return x, x.new_ones(())
    scale = (x.abs().amax() if x.numel() else x.new_zeros(())) / MAXIMUM[precision]
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    steps = torch.nan_to_num(x / scale).clamp(-MAXIMUM[precision], MAXIMUM[precision])
    if precision == "int8":
        return steps.round().to(torch.int8), scale
    return (_e3m2(steps) if precision == "fp6" else steps).to(torch.float8_e4m3fn), scale


def product(a: Quantized, b: Quantized, precision: Precision) -> Tensor:
    """The product of two quantized matrices, `(m, k)` and `(k, n)`, in the dtype of their scales."""
    (left, scale), (right, other) = a, b
    if precision == "int8":
        return _integers(left, right, scale.dtype) * (scale * other)
    return (left.to(scale.dtype) @ right.to(scale.dtype)) * (scale * other)


def turned(a: Quantized) -> Quantized:
    """The transpose of a quantized matrix."""
    return a[0].mT, a[1]


def _integers(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """The exact product of int8 matrices."""
    if left.device.type == "cpu" and left.shape[1] <= 2**31 // 127**2:  # then int32 holds any sum
        return torch._int_mm(left.contiguous(), right.contiguous()).to(dtype)  # pyright: ignore[reportPrivateImportUsage]
    return (left.double() @ right.double()).to(dtype)  # exact too, and takes any shape


def _e3m2(x: Tensor) -> Tensor:
    """To the nearest number with 3 bits of exponent and 2 of mantissa, ties to even."""
    exponent = torch.frexp(x).exponent.clamp(min=-1)  # of subnormal numbers, those below 1/4, the spacing is that of 1/4
    spacing = torch.ldexp(torch.ones_like(x), exponent - 3)
    return (x / spacing).round() * spacing


__all__ = ["Precision", "Quantized", "product", "quantize", "turned"]
