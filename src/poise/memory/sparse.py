"""The largest entries of a long vector, kept as places and values, block by block.

Each block of neighbours gives the same share of its entries, so that a place is a number within its block and fits int16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 2**15  # elements of a block: int16 numbers them


@dataclass(frozen=True)
class TopK:
    """Which entries of a vector are kept.

    Args:
        density: of a block of n entries the `ceil(density * n)` largest in magnitude are kept.
        block: n; the last block of a vector may be shorter and has a number of its own.

    Raises:
        ValueError: density not in (0, 1], block not in 1..32768.
    """

    density: float = 0.01
    block: int = 4096

    def __post_init__(self) -> None:
        if not 0.0 < self.density <= 1.0:
            raise ValueError(f"density={self.density}: must be in (0, 1]")
        if not 1 <= self.block <= LARGEST:
            raise ValueError(f"block={self.block}: must be from 1 to {LARGEST}, which int16 can number")

    def counts(self, d: int) -> tuple[int, int, int]:
        """Full blocks, entries kept of each, and entries kept of the shorter block that is left."""
        full, rest = divmod(d, self.block)
        return full, self._of(self.block), self._of(rest)

    def _of(self, n: int) -> int:
        return math.ceil(self.density * n)

    def kept(self, d: int) -> int:
        """Entries kept of d."""
        full, many, few = self.counts(d)
        return full * many + few

    def choose(self, a: Tensor) -> Tensor:
        """Places of the largest entries of a flat tensor within their blocks, int16, one block after another."""
        full, many, few = self.counts(a.numel())
        size, cut = a.abs(), full * self.block
        whole = size[:cut].reshape(full, self.block)
        found = [whole.topk(many, sorted=False).indices.reshape(-1)] if full else []
        found += [size[cut:].topk(few, sorted=False).indices] if few else []
        return torch.cat(found).to(torch.int16) if found else torch.zeros(0, dtype=torch.int16, device=a.device)

    def where(self, places: Tensor, d: int) -> Tensor:
        """Places (..., kept) as indices into the vector of d entries, int64."""
        full, many, few = self.counts(d)
        starts = torch.arange(full + 1, device=places.device) * self.block
        counts = torch.tensor([many] * full + [few], device=places.device)
        return places.long() + starts.repeat_interleave(counts)


def check_kept(name: str, dtype: torch.dtype) -> None:
    """A format of kept values, or ValueError."""
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"{name}={dtype}: must be torch.float32 or torch.bfloat16")


def add_at(target: Tensor, where: Tensor, values: Tensor) -> Tensor:
    """Add `values` to the entries `where` of a flat tensor, in place; equal places add up, always in the same order."""
    if target.device.type == "cpu":
        return target.index_add_(0, where, values)
    return target.index_put_((where,), values, accumulate=True)


__all__ = ["TopK", "add_at", "check_kept"]
