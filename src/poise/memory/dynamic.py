"""The low-bit formats of the 8-bit and the 4-bit optimizer papers, computed instead of looked up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from poise.catalog import Paper, method
from poise.memory.codec import CODECS, Codec, Kind, Part, block_scale, check_kind, over_scale, pack, unpack


def dynamic_value(place: Tensor, decades: int, first: int) -> Tensor:
    """The dynamic map at integer places: decade i of `decades` has n = first 2^i equal cells, at places n ... 2n - 1.

        value = 10^(i - decades + 1) (0.1 + 0.9 (place - n + 1/2) / n)

    A decade is a line, and the next one is steeper by 5 and lies above it exactly from its own first place on: the map is the
    largest of the lines. The place before the first is 0, the one after the last is 1.
    """
    value = torch.zeros_like(place)
    for i in range(decades):
        cells, top = first * 2**i, 10.0 ** (i - decades + 1)
        value = torch.maximum(value, place * (0.9 * top / cells) + top * (0.45 / cells - 0.8))
    return torch.clamp(value, max=1.0)


def dynamic_place(y: Tensor, decades: int, first: int) -> Tensor:
    """The place whose value is nearest to y in [0, 1]: which decade, by the true midpoints between decades, then which cell."""
    cells = torch.full_like(y, float(first))
    top = torch.full_like(y, 10.0 ** (1 - decades))
    for i in range(decades - 1):
        here, above = first * 2**i, 10.0 ** (i - decades + 1)
        beyond = y > above * (1 + 0.9 / here)
        cells = torch.where(beyond, 2.0 * here, cells)
        top = torch.where(beyond, 10.0 * above, top)
    place = torch.round(cells * (y / top - 0.1) * (1 / 0.9) + (cells - 0.5))
    place = torch.minimum(place, 2 * cells - 1)
    last = first * 2 ** (decades - 1)
    place = torch.where(y > 1 - 0.225 / last, 2.0 * last, place)
    return torch.where(y > 10.0 ** (1 - decades) * (0.05 + 0.225 / first), place, first - 1.0)


def _mirrored(place: Tensor, decades: int) -> Tensor:
    """The signed map: an odd function of the place."""
    value = dynamic_value(place.abs(), decades, 1)
    return torch.where(place < 0, -value, value)


@method(
    "int8-dynamic",
    family="memory",
    kind="codec",
    paper=Paper("8-bit Optimizers via Block-wise Quantization", arxiv="2110.02861", year=2022),
    mutant=("1 + 0.9 / here", "1.0"),
)
@dataclass(frozen=True)
class Dynamic8(Codec):
    """8-bit codes of the dynamic map, nearest, under one float32 scale a block: 1.016 bytes per element.

        s = max |x| over the block,    code = argmin_c |map(c) - x / s|,    x ~ map(code) s

    The map has 7 decades down from 1, cut into 1, 2, ..., 64 equal cells (signed, mirrored) or 2, 4, ..., 128 (nonneg) and
    represented by the cells' midpoints, and besides them 0 and 1. There is no -1: an extreme that is negative comes back as
    -0.99297 of itself. A nonneg entry above zero never gets the zero code (the released code lets it). "upper" takes the next
    value above.

    Args:
        block: default 256 as in the released code (2048 in the paper).
    """

    block: int = 256

    def parts(self, kind: Kind) -> dict[str, Part]:
        check_kind(kind)
        return {"codes": Part(torch.uint8, self.block), "scale": Part(torch.float32, 1)}

    def encode(self, x: Tensor, kind: Kind, bits: Tensor | None = None) -> dict[str, Tensor]:
        check_kind(kind)
        if kind == "signed":
            scale = block_scale(x)
            place = dynamic_place(over_scale(x.abs(), scale), 7, 1)
            code = torch.where(x < 0, 127 - torch.clamp(place, max=127.0), 127 + place)
            return {"codes": code.to(torch.uint8), "scale": scale}
        x = torch.clamp(x, min=0.0)
        scale = block_scale(x)
        place = dynamic_place(over_scale(x, scale), 7, 2)
        place = torch.maximum(place, torch.where(x > 0, 2.0, 1.0))
        if kind == "upper":
            place = torch.where(dynamic_value(place, 7, 2) * scale < x, place + 1, place)
        return {"codes": (place - 1).to(torch.uint8), "scale": scale}

    def decode(self, parts: Mapping[str, Tensor], kind: Kind) -> Tensor:
        check_kind(kind)
        code = parts["codes"].to(torch.float32)
        if kind != "signed":
            return dynamic_value(code + 1, 7, 2) * parts["scale"]
        return _mirrored(code - 127, 7) * parts["scale"]


@method(
    "int4-dynamic",
    family="memory",
    kind="codec",
    paper=Paper("Memory Efficient Optimizers with 4-bit States", arxiv="2309.01507", year=2023),
    mutant=("torch.clamp(torch.round(y * 16), min=1.0)", "torch.round(y * 15)"),
)
@dataclass(frozen=True)
class Dynamic4(Codec):
    """4-bit codes, nearest, under one float32 scale a block: 0.53 bytes per element.

        s = max |x| over the block
        signed:  x ~ map(c) s, the dynamic map of 3 decades: 0, 0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875, 1,
                 and the negatives of all but the last
        nonneg:  x ~ (c + 1) / 16 s, without zero, so that m / sqrt(v) stays bounded; only a block of zeros decodes to zeros

    The paper scales second moments of matrices by the smaller of their row's and column's maximum; here both moments have
    block scales, as in the released fused kernel. "upper" takes the next value of the nonneg map above.

    Args:
        block: default 128, even.
    """

    block: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block % 2:
            raise ValueError(f"Dynamic4(block={self.block}): two 4-bit codes share a byte, so the block must be even")

    def parts(self, kind: Kind) -> dict[str, Part]:
        check_kind(kind)
        return {"codes": Part(torch.uint8, self.block // 2), "scale": Part(torch.float32, 1)}

    def encode(self, x: Tensor, kind: Kind, bits: Tensor | None = None) -> dict[str, Tensor]:
        check_kind(kind)
        if kind == "signed":
            scale = block_scale(x)
            place = dynamic_place(over_scale(x.abs(), scale), 3, 1)
            code = torch.where(x < 0, 7 - torch.clamp(place, max=7.0), 7 + place)
            return {"codes": pack(code.to(torch.int32)), "scale": scale}
        x = torch.clamp(x, min=0.0)
        scale = block_scale(x)
        y = over_scale(x, scale)
        place = torch.clamp(torch.round(y * 16), min=1.0)
        if kind == "upper":
            place = torch.where(place * (1 / 16) * scale < x, place + 1, place)
        return {"codes": pack((place - 1).to(torch.int32)), "scale": scale}

    def decode(self, parts: Mapping[str, Tensor], kind: Kind) -> Tensor:
        check_kind(kind)
        code = unpack(parts["codes"]).to(torch.float32)
        if kind != "signed":
            return (code + 1) * (1 / 16) * parts["scale"]
        return _mirrored(code - 7, 3) * parts["scale"]


CODECS["int8-dynamic"] = Dynamic8()
CODECS["int4-dynamic"] = Dynamic4()
