"""4-bit codes on a squared grid, for the entries of eigenvectors: functions, not a state format.

    code c in 0..15,  x ~ q(c) s,   q(c) = sign(g) g^2 with g = -1, -13/15, ..., 13/15, 1, but q(7) = 0
    s = max |x| over 64 consecutive entries of a row

The entries of an orthogonal matrix crowd around zero, and so do the values: half of them lie within 0.22 s. One code is zero
exactly, so that the identity comes back as it was.

    codes, scale = quantize(V)                    # uint8 (..., 32 ceil(n / 64)), float (..., ceil(n / 64))
    V = dequantize(codes, scale, n)

Source: "linear-2" of "4-bit Shampoo for Memory-Efficient Network Training" (arXiv 2405.18144).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .codec import pack, unpack

BLOCK = 64


def codebook(dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    """q(0), ..., q(15), in rising order."""
    grid = torch.linspace(-1, 1, 16, dtype=torch.float64)
    grid[7] = 0.0
    return (grid.sign() * grid.square()).to(device=device, dtype=dtype)


def packed_shape(n: int) -> tuple[int, int]:
    """Bytes and scales of a row of n entries."""
    blocks = -(-n // BLOCK)
    return blocks * BLOCK // 2, blocks


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, two to a byte, and scales of the rows of x (..., n), each entry to the nearest value of its block's grid.

    What is not finite makes its block nan.
    """
    n = x.shape[-1]
    blocks = packed_shape(n)[1]
    rows = torch.nn.functional.pad(x, (0, blocks * BLOCK - n)).unflatten(-1, (blocks, BLOCK))
    scale = rows.abs().amax(-1)
    values = codebook(x.dtype, x.device)
    over = (rows / torch.where(scale > 0, scale, 1.0)[..., None]).contiguous()
    codes = torch.bucketize(over, (values[1:] + values[:-1]) / 2)
    bytes_ = pack(codes.to(torch.int32).reshape(-1, BLOCK)).reshape(*x.shape[:-1], blocks * BLOCK // 2)
    return bytes_, torch.where(scale.isfinite(), scale, torch.nan)


def dequantize(codes: Tensor, scale: Tensor, n: int) -> Tensor:
    """The values of the rows, (..., n), in the dtype of the scales."""
    found = unpack(codes.reshape(-1, BLOCK // 2)).reshape(*scale.shape, BLOCK)
    values = codebook(scale.dtype, scale.device)[found.long()] * scale[..., None]
    return values.flatten(-2)[..., :n]


__all__ = ["BLOCK", "codebook", "dequantize", "packed_shape", "quantize"]
