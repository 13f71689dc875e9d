"""The number formats of GGUF, each a block of bytes to so many float32.

    Q8_0            x = d q                     d float16, 32 q of 8 bits
    Q4_0, Q5_0      x = d (q - 8), d (q - 16)   32 q of 4 or 5 bits: entries 0-15 in the low halves of bytes, 16-31 in the high
    Q4_1, Q5_1      x = d q + m
    Q2_K, Q4_K, Q5_K  x = d s q - m t           256 q in groups of 16 (Q2_K) or 32; s, t of a group in 4 or 6 bits
    Q3_K, Q6_K      x = d s q                   groups of 16; q signed; s of 6 or 8 bits, signed

The layouts are those of ggml's `ggml-common.h`, and the order of operations that of its reference code, so that results are
equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kind:
    """Attributes: entries and bytes of a block; how blocks (n, nbytes) become (n, entries); dtype of the result."""

    name: str
    entries: int
    nbytes: int
    decode: Callable[[Tensor], Tensor]
    dtype: torch.dtype = torch.float32


def _plain(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def decode(b: Tensor) -> Tensor:
        found = b.view(dtype)
        return found.float() if dtype in (torch.float16, torch.bfloat16) else found

    return decode


def _half(b: Tensor, at: int) -> Tensor:
    """The float16 at a byte of each block, (n, 1)."""
    return b[:, at : at + 2].contiguous().view(torch.float16).float()


def _cut(b: Tensor, bits: int) -> Tensor:
    """(..., m) bytes -> (..., 8 / bits, m) fields of so many bits, lowest first."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8).unsqueeze(-1)
    return (b.unsqueeze(-2) >> shifts) & (2**bits - 1)


def _nibbles(b: Tensor, at: int) -> Tensor:
    """Sixteen bytes -> 32 entries: all low halves, then all high ones."""
    return _cut(b[:, at : at + 16], 4).flatten(1)


def _fifth(b: Tensor, at: int) -> Tensor:
    """Four bytes -> the fifth bits of 32 entries."""
    return _cut(b[:, at : at + 4], 1).transpose(1, 2).flatten(1) << 4


def _q8_0(b: Tensor) -> Tensor:
    return _half(b, 0) * b[:, 2:].view(torch.int8).float()


def _q4_0(b: Tensor) -> Tensor:
    return _half(b, 0) * (_nibbles(b, 2).float() - 8)


def _q4_1(b: Tensor) -> Tensor:
    return _half(b, 0) * _nibbles(b, 4).float() + _half(b, 2)


def _q5_0(b: Tensor) -> Tensor:
    return _half(b, 0) * ((_nibbles(b, 6) | _fifth(b, 2)).float() - 16)


def _q5_1(b: Tensor) -> Tensor:
    return _half(b, 0) * (_nibbles(b, 8) | _fifth(b, 4)).float() + _half(b, 2)


def _groups(b: Tensor, at: int) -> tuple[Tensor, Tensor]:
    """Twelve bytes -> scales and minima of eight groups, six bits each, (n, 8, 1).

    Bytes 0-3 hold the first four scales, 4-7 the first four minima, in their low six bits; 8-11 the low halves of the others,
    and the high two bits of 0-7 what those lack.
    """
    s, t, low = b[:, at : at + 4], b[:, at + 4 : at + 8], b[:, at + 8 : at + 12]
    scales = torch.cat([s & 63, (low & 15) | (s >> 6 << 4)], 1)
    minima = torch.cat([t & 63, (low >> 4) | (t >> 6 << 4)], 1)
    return scales.float().unsqueeze(-1), minima.float().unsqueeze(-1)


def _halves(b: Tensor, at: int) -> Tensor:
    """128 bytes -> 8 groups of 32 entries: 32 bytes hold one group in their low halves and the next in their high ones."""
    return _cut(b[:, at : at + 128].reshape(-1, 4, 32), 4).reshape(-1, 8, 32)


def _q4_k(b: Tensor) -> Tensor:
    scales, minima = _groups(b, 4)
    d, m = _half(b, 0).unsqueeze(-1), _half(b, 2).unsqueeze(-1)
    return (d * scales * _halves(b, 16).float() - m * minima).flatten(1)


def _q5_k(b: Tensor) -> Tensor:
    scales, minima = _groups(b, 4)
    d, m = _half(b, 0).unsqueeze(-1), _half(b, 2).unsqueeze(-1)
    q = _halves(b, 48) | (_cut(b[:, 16:48], 1) << 4)
    return (d * scales * q.float() - m * minima).flatten(1)


def _quarters(b: Tensor, at: int) -> Tensor:
    """64 bytes -> 16 groups of 16 entries of two bits: 32 bytes hold 32 entries in their lowest bits, the next 32 above, ..."""
    return _cut(b[:, at : at + 64].reshape(-1, 2, 32), 2).reshape(-1, 16, 16)


def _q2_k(b: Tensor) -> Tensor:
    scales, minima = (b[:, :16] & 15).float().unsqueeze(-1), (b[:, :16] >> 4).float().unsqueeze(-1)
    d, m = _half(b, 80).unsqueeze(-1), _half(b, 82).unsqueeze(-1)
    return (d * scales * _quarters(b, 16).float() - m * minima).flatten(1)


def _q3_k(b: Tensor) -> Tensor:
    # A third bit that is not set counts as -4.
    third = _cut(b[:, :32], 1).reshape(-1, 16, 16)
    q = _quarters(b, 32).float() - 4 * (1 - third.float())
    low, high = _cut(b[:, 96:104], 4).flatten(1), _cut(b[:, 104:108], 2).flatten(1)
    scales = ((low | (high << 4)).float() - 32).unsqueeze(-1)
    return (_half(b, 108).unsqueeze(-1) * scales * q).flatten(1)


def _q6_k(b: Tensor) -> Tensor:
    low = _cut(b[:, :128].reshape(-1, 2, 64), 4).reshape(-1, 16, 16)
    high = _quarters(b, 128)
    scales = b[:, 192:208].contiguous().view(torch.int8).float().unsqueeze(-1)
    q = (low | (high << 4)).float() - 32
    return (_half(b, 208).unsqueeze(-1) * scales * q).flatten(1)


KINDS: dict[int, Kind] = {
    0: Kind("F32", 1, 4, _plain(torch.float32)),
    1: Kind("F16", 1, 2, _plain(torch.float16)),
    2: Kind("Q4_0", 32, 18, _q4_0),
    3: Kind("Q4_1", 32, 20, _q4_1),
    6: Kind("Q5_0", 32, 22, _q5_0),
    7: Kind("Q5_1", 32, 24, _q5_1),
    8: Kind("Q8_0", 32, 34, _q8_0),
    10: Kind("Q2_K", 256, 84, _q2_k),
    11: Kind("Q3_K", 256, 110, _q3_k),
    12: Kind("Q4_K", 256, 144, _q4_k),
    13: Kind("Q5_K", 256, 176, _q5_k),
    14: Kind("Q6_K", 256, 210, _q6_k),
    24: Kind("I8", 1, 1, _plain(torch.int8), torch.int8),
    25: Kind("I16", 1, 2, _plain(torch.int16), torch.int16),
    26: Kind("I32", 1, 4, _plain(torch.int32), torch.int32),
    27: Kind("I64", 1, 8, _plain(torch.int64), torch.int64),
    28: Kind("F64", 1, 8, _plain(torch.float64), torch.float64),
    30: Kind("BF16", 1, 2, _plain(torch.bfloat16)),
}
