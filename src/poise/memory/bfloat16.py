"""State in bfloat16, rounded stochastically."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from poise.catalog import Paper, method
from poise.memory.codec import CODECS, Codec, Kind, Part, check_kind
from poise.memory.rounding import stochastic_bf16, upward_bf16


@method(
    "bf16",
    family="memory",
    kind="codec",
    paper=Paper("Revisiting BFloat16 Training", arxiv="2010.06192", year=2020),
    mutant=("stochastic_bf16(x, bits)", "x.to(torch.bfloat16)"),
)
@dataclass(frozen=True)
class BFloat16(Codec):
    """bfloat16, element by element, stochastically rounded: 2 bytes per element.

        x -> one of the two neighbours in bfloat16, with the probabilities that make its mean x

    To nearest, a moving average with decay 0.999 never falls: it moves by 1/1000, and half a spacing is 1/256. "upper" rounds
    towards +infinity, negative values too.
    """

    stochastic: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block != 1:
            raise ValueError(f"BFloat16(block={self.block}): it has no scale, so the block is 1")
        if not self.stochastic:
            raise ValueError("BFloat16(stochastic=False): to nearest a slow moving average stands still")

    def parts(self, kind: Kind) -> dict[str, Part]:
        check_kind(kind)
        return {"values": Part(torch.bfloat16, 1)}

    def encode(self, x: Tensor, kind: Kind, bits: Tensor | None = None) -> dict[str, Tensor]:
        """float32 -> {"values": bfloat16}, entry by entry."""
        check_kind(kind)
        if kind == "upper":
            return {"values": upward_bf16(x)}
        return {"values": x.to(torch.bfloat16) if bits is None else stochastic_bf16(x, bits)}

    def decode(self, parts: Mapping[str, Tensor], kind: Kind) -> Tensor:
        """{"values": bfloat16} -> float32."""
        check_kind(kind)
        return parts["values"].to(torch.float32)


CODECS["bf16"] = BFloat16()
