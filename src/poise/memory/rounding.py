"""bfloat16 weights that do not stand still, and the noise that rounding uses.

bfloat16 keeps 8 significant bits: to nearest, a weight w does not move at all while |update| < 2^-9 |w|. Three ways out, all
from Revisiting BFloat16 Training (arXiv 2010.06192) or beside it: stochastic rounding (no memory), a bfloat16 residual by
Kahan's summation (2 bytes), and the lower half of a float32 master weight (2 bytes, exact).

Noise is a function of a key and of the element's index, never of a generator: order, batching, resuming and the number of
ranks then cannot change a result.

Every function is pure tensor math that works under compilation too. Bit patterns are masked rather than converted to bfloat16
and back, because a compiler is free to drop such a pair of conversions.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def int32(number: int) -> int:
    """A number modulo 2^32, as the signed integer of the same bits."""
    return (number + 2**31) % 2**32 - 2**31


def _shift(x: Tensor, places: int) -> Tensor:
    """Logical right shift of int32."""
    return (x >> places) & (2 ** (32 - places) - 1)


def key_of(seed: int, name: str, step: int = 0, salt: int = 0) -> int:
    """A key for `noise_bits`, in the range of int32: the same in every process, on every machine and in every version."""
    digest = hashlib.blake2b(repr((int(seed), str(name), int(step), int(salt))).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little", signed=True)


def noise_bits(key: Tensor | int, index: Tensor) -> Tensor:
    """Hashed bits for each element, int32, for `high16`, `low16` and `unit`.

        x = index * 0x9E3779B1 ^ key
        x = (x ^ x >> 16) * 0x7FEB352D;   x = (x ^ x >> 15) * 0x846CA68B        (mod 2^32)

    A last x ^ x >> 16 belongs to it, which changes nothing in the upper half: who reads the lower one does it.

    Args:
        key: int32, 0-d or (1,); see `key_of`. A new one for each step, or the same noise comes back.
        index: int32, the element's index in the whole tensor, not in the shard (mod 2^32 for larger tensors).
    """
    x = (index * int32(0x9E3779B1)) ^ key  # with a sum, another key would be the same stream from another place on
    x = (x ^ _shift(x, 16)) * 0x7FEB352D
    return (x ^ _shift(x, 15)) * int32(0x846CA68B)


def high16(noise: Tensor) -> Tensor:
    """The upper 16 bits of `noise_bits`, int32 in [0, 65535]: what rounding wants."""
    return _shift(noise, 16)


def low16(noise: Tensor) -> Tensor:
    """The lower 16 bits: a second draw from the same hash."""
    return (noise ^ _shift(noise, 16)) & 0xFFFF


def unit(noise: Tensor) -> Tensor:
    """`noise_bits` as uniform numbers in [0, 1) with 24 bits, float32."""
    return _shift(noise ^ _shift(noise, 16), 8).to(torch.float32) * 2.0**-24


def uniform(key: Tensor | int, index: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) with 24 bits, float32."""
    return unit(noise_bits(key, index))


def _keep_nan(rounded: Tensor, x: Tensor) -> Tensor:
    """Integer arithmetic turns some NaNs into infinity or -0.0; infinities it leaves, and so does the mask."""
    return torch.where(x == x, rounded, x)


def _upper_half(bits: Tensor) -> Tensor:
    return (bits & -0x10000).view(torch.float32)


def stochastic_bf16(x: Tensor, bits: Tensor) -> Tensor:
    """float32 -> bfloat16, away from zero with probability (low 16 bits of x) / 65536, so that the mean is x exactly.

        y = upper half of (bits of x + rho),   rho uniform in [0, 65535]

    Values that bfloat16 has are unchanged. Above the largest bfloat16 it may round to infinity, as to nearest does; what is
    not finite is cast.
    """
    return _keep_nan(_upper_half(x.view(torch.int32) + bits), x).to(torch.bfloat16)


def upward_bf16(x: Tensor) -> Tensor:
    """float32 -> the smallest bfloat16 that is not below it."""
    pattern = x.view(torch.int32)
    return _keep_nan(_upper_half(torch.where(x > 0, pattern + 0xFFFF, pattern)), x).to(torch.bfloat16)


def _nearest(x: Tensor) -> Tensor:
    """float32 -> the nearest bfloat16 (ties to even), still in float32."""
    pattern = x.view(torch.int32)
    return _keep_nan(_upper_half(pattern + 0x7FFF + (_shift(pattern, 16) & 1)), x)


def nearest_bf16(x: Tensor) -> Tensor:
    """float32 -> the nearest bfloat16, ties to even: what a cast does, and no compiler undoes."""
    return _nearest(x).to(torch.bfloat16)


def kahan_add(w: Tensor, c: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
    """One compensated step of bfloat16 weights: (w, c) after adding `update`; c starts at zero.

        c <- bf16(c + update);   w_old = w;   w <- bf16(w + c);   c <- bf16(c + (w_old - w))

    Decay belongs INTO the update: a bfloat16 weight times 1 - lr * weight_decay stays what it is. c has 8 bits too, so what is
    below about 2^-17 |w| is lost; `split` loses nothing at the same cost.
    """
    old = w.to(torch.float32)
    residual = _nearest(c.to(torch.float32) + update.to(torch.float32))
    new = _nearest(old + residual)
    residual = _nearest(residual + _nearest(old - new))
    return new.to(torch.bfloat16), residual.to(torch.bfloat16)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 master weight as the bfloat16 that the model uses and 16 further bits: (hi bfloat16, lo int16).

        hi = (bits of x + 0x8000) >> 16,    lo = bits of x - (hi << 16), in [-32768, 32767]

    hi is x to nearest, with ties away from zero. `join` gives x back bit for bit; a NaN comes back as the usual NaN.
    """
    pattern = torch.where(torch.isnan(x), torch.nan, x).view(torch.int32)
    hi = (pattern + 0x8000) >> 16
    return hi.to(torch.int16).view(torch.bfloat16), (pattern - (hi << 16)).to(torch.int16)


def join(hi: Tensor, lo: Tensor) -> Tensor:
    """The float32 that `split` took apart."""
    return ((hi.view(torch.int16).to(torch.int32) << 16) + lo.to(torch.int32)).view(torch.float32)
