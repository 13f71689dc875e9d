"""8-bit state on even grids: the cheapest format, for second moments that differ little within a block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from poise.memory.codec import CODECS, Codec, Kind, Part, block_scale, check_kind, over_scale


@dataclass(frozen=True)
class Linear8(Codec):
    """8-bit codes on an even grid, of the root for second moments; to nearest. 1.03 bytes per element.

        s = max |x| over the block                                         stored in float32
        signed:  c = round(127 x / s),            x ~ c / 127 s
        nonneg:  c = round(255 sqrt(x / s)),      x ~ (c / 255)^2 s;       c = 0 only for x = 0
        upper:   as nonneg, with the next code where that lies below x

    The relative error of the root is at most sqrt(s / x) / 510: small where the entries of a block are alike, and all of it for
    those below s / 510^2.

    Args:
        block: default 128.

    Source: the linear alternative to the map of 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861).
    """

    block: int = 128

    def parts(self, kind: Kind) -> dict[str, Part]:
        check_kind(kind)
        dtype = torch.int8 if kind == "signed" else torch.uint8
        return {"codes": Part(dtype, self.block), "scale": Part(torch.float32, 1)}

    def encode(self, x: Tensor, kind: Kind, bits: Tensor | None = None) -> dict[str, Tensor]:
        check_kind(kind)
        scale = block_scale(x)
        if kind == "signed":
            return {"codes": torch.round(over_scale(x, scale) * 127).to(torch.int32).to(torch.int8), "scale": scale}
        # NaN reaches the scale; what is below zero counts as zero.
        code = torch.round(torch.sqrt(over_scale(torch.where(x > 0, x, 0.0), scale)) * 255)
        if kind == "upper":
            code = torch.where(_square(code) * scale < x, code + 1, code)
        code = torch.where((x > 0) & (code < 1), 1.0, code)
        return {"codes": code.to(torch.int32).to(torch.uint8), "scale": scale}

    def decode(self, parts: Mapping[str, Tensor], kind: Kind) -> Tensor:
        check_kind(kind)
        code = parts["codes"].to(torch.float32)
        return (code * (1 / 127) if kind == "signed" else _square(code)) * parts["scale"]


def _square(code: Tensor) -> Tensor:
    y = code * (1 / 255)  # exactly 1 for 255
    return y * y


CODECS["int8-linear"] = Linear8()
