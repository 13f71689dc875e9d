"""How optimizer state is kept in fewer bits: what a codec is, and the formats that exist by name.

A codec stores one state tensor as a few smaller ones and gives float32 back. The engine cuts a slot of a parameter of shape
(d0, ...) into rows, one for each index of the first dimension, and each row into blocks of `block` consecutive elements, so
that a shard along the first dimension encodes as the whole does. It pads the last block of a row with zeros.

    parts = codec.encode(x, "nonneg", bits)     # x: float32 (blocks, block) -> {"codes": (blocks, ...), "scale": (blocks, 1)}
    x = codec.decode(parts, "nonneg")           # float32 again

The contract:

- `encode` and `decode` are pure tensor math: no in-place writes, no branches on values, no table lookups. They are traced and
  compiled once, with the number of blocks left open; maps are therefore computed, not looked up, which also keeps them in
  vector registers.
- Blocks are independent. What is not finite makes its own block decode to values that are not finite (all of it, for the
  formats with a scale) and touches no other.
- `kind` is the slot's: "signed"; "nonneg" (a second moment: zero only where it was zero, underflow apart, because
  m / (sqrt(0) + eps) explodes); "upper" (nonnegative, and never below what was stored: a running maximum, a bound).
- A codec that rounds stochastically is given `bits`, int32 uniform in [0, 65535], one for each element; see `rounding`.
  Without them it rounds to nearest, which is right for initial values and wrong for moving averages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Kind = Literal["signed", "nonneg", "upper"]


@dataclass(frozen=True)
class Part:
    """One stored tensor of an encoded slot: its dtype, and how many entries each block has in it.

    Or, of a format that sees a slot whole, which of the slot's axes it follows; see `matrix`.
    """

    dtype: torch.dtype
    per_block: int = 1
    axes: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Codec:
    """A state format. Frozen: compared by value, hashable, and picklable, so that it can name a compiled kernel.

    Args:
        block: consecutive elements that share a scale; 1 for formats without one, which see tensors of any shape.
        stochastic: whether `encode` wants `bits` (it has no use for them where the kind is "upper").
    """

    block: int = 1
    stochastic: bool = False

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"{type(self).__name__}(block={self.block}): block must be at least 1")

    def for_slot(self, kind: Kind, shape: tuple[int, ...]) -> Codec:
        """The codec that keeps a slot of this kind and shape, where one format has several."""
        return self

    def parts(self, kind: Kind) -> dict[str, Part]:
        """What is stored, by name."""
        raise NotImplementedError(f"{type(self).__name__}.parts")

    def encode(self, x: Tensor, kind: Kind, bits: Tensor | None = None) -> dict[str, Tensor]:
        """float32 (blocks, block) -> the parts, each (blocks, per_block)."""
        raise NotImplementedError(f"{type(self).__name__}.encode")

    def decode(self, parts: Mapping[str, Tensor], kind: Kind) -> Tensor:
        """The parts -> float32 (blocks, block)."""
        raise NotImplementedError(f"{type(self).__name__}.decode")

    def bytes_per_element(self, kind: Kind) -> float:
        """Stored bytes for each element of a full block, scales included."""
        return sum(part.dtype.itemsize * part.per_block for part in self.parts(kind).values()) / self.block

    @property
    def name(self) -> str:
        """The name it is known by in `CODECS`, or its constructor call."""
        known = (name for name, codec in CODECS.items() if codec == self)
        return next(known, repr(self))


def check_kind(kind: str) -> None:
    """ValueError for a kind of state that is never encoded."""
    if kind not in get_args(Kind):
        raise ValueError(f"kind={kind!r}: only {', '.join(get_args(Kind))} state is encoded")


CODECS: dict[str, Codec | None] = {"fp32": None}  # by the name a user writes, `state="int8"`; None: kept as it is


def get(codec: str | Codec | None) -> Codec | None:
    """The codec called `codec`, or the codec itself; None means that state is kept in float32 as it is."""
    if codec is None or isinstance(codec, Codec):
        return codec
    if not isinstance(codec, str):
        raise TypeError(f"codec={codec!r}: expected a name or a Codec")
    if codec not in CODECS:
        raise ValueError(f"unknown state format {codec!r}; known: {', '.join(sorted(CODECS))}")
    return CODECS[codec]


def block_scale(x: Tensor) -> Tensor:
    """The largest magnitude of each block, (blocks, 1); NaN if there is one.

    As integers, the patterns of magnitudes have the order of the numbers, with NaN above infinity, and no compare has to look
    out for it.
    """
    return (x.view(torch.int32) & 0x7FFFFFFF).amax(1, keepdim=True).view(torch.float32)


def over_scale(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale in [-1, 1], with 0 for a block of zeros.

    A division, not a product with 1 / scale, which overflows for scales below 3e-39 and may miss 1 by a rounding.
    """
    return x / torch.where(scale > 0, scale, 1.0)


def pack(codes: Tensor) -> Tensor:
    """int32 codes below 16, (blocks, block) -> uint8 (blocks, block / 2): the first half in the low nibbles, then the other.

    int32, because vector registers have no shift of single bytes.
    """
    half = codes.shape[1] // 2
    return (codes[:, :half] | (codes[:, half:] << 4)).to(torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`, int32."""
    places = torch.arange(2, dtype=torch.int32, device=packed.device)[None, :, None] * 4
    nibbles = (packed[:, None, :].to(torch.int32) >> places) & 15
    return nibbles.reshape(packed.shape[0], 2 * packed.shape[1])
