"""Numbers in 4 bits between the smallest and the largest of their block.

    unit = (hi - lo) / 15,   code = floor((a - lo) / unit + 1/2),   a ~ lo + code * unit

lo and hi are kept in bfloat16 and rounded outwards, so that no number lies outside and none is further than unit / 2 from what
its code stands for. Where all numbers of a block are one that bfloat16 holds, unit is 0 and so are the codes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .codec import pack, unpack

LEVELS = 15


def shape(d: int, block: int) -> tuple[int, int]:
    """Blocks and the numbers of one, for d numbers; a single short block is no longer than it must be for whole bytes."""
    size = max(min(block, d + d % 2), 2)
    return -(-d // size), size


def encode(a: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, (blocks, size / 2) bytes, and lo and hi, (blocks,), of a flat tensor; what is not finite makes its block nan."""
    d = a.numel()
    count, size = shape(d, block)
    rows = pad(a, (0, count * size - d)).reshape(count, size)
    if count * size > d:
        rows[-1, d - count * size :] = a[-1]  # one that is there changes neither end
    least, most = rows.amin(1), rows.amax(1)
    finite = least.isfinite() & most.isfinite()  # of all numbers between them, too
    lo = _outwards(torch.where(finite, least, torch.nan), -1)
    hi = _outwards(torch.where(finite, most, torch.nan), 1)
    low, unit = _ends(lo, hi, a.dtype)
    codes = (rows - low).div_(torch.where(unit > 0, unit, 1.0)).add_(0.5).floor_().clamp_(0, LEVELS).nan_to_num_(0.0)
    return pack(codes.to(torch.int32)), lo, hi


def decode(codes: Tensor, lo: Tensor, hi: Tensor, d: int, dtype: torch.dtype) -> Tensor:
    """The d numbers that `encode` was given, nearly."""
    low, unit = _ends(lo, hi, dtype)
    return unpack(codes).to(dtype).mul_(unit).add_(low).reshape(-1)[:d]


def _ends(lo: Tensor, hi: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    low = lo.to(dtype)[:, None]
    return low, (hi.to(dtype)[:, None] - low) / LEVELS


def _outwards(end: Tensor, sign: int) -> Tensor:
    """To bfloat16, down for sign -1 and up for 1."""
    near = end.bfloat16()
    short = (near.to(end.dtype) - end) * sign < 0
    return torch.where(short, torch.nextafter(near, torch.full_like(near, sign * torch.inf)), near)


__all__ = ["decode", "encode", "shape"]
