"""What an adapter does to a weight, a few rows of the weight at a time."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .errors import CheckpointError

PARTS = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.weight)?",
    re.DOTALL,
)


class Update(Protocol):
    """What becomes of one weight of the base.

    Attributes:
        shape: of the weight.
        whole: whether it can only be applied to all rows at once.
    """

    @property
    def shape(self) -> torch.Size: ...

    @property
    def whole(self) -> bool: ...

    def applied(self, weight: Tensor, start: int = 0) -> Tensor:
        """Rows of the weight, from row `start` on -> the same rows after the update, in float32 or float64."""
        ...


@dataclass(frozen=True)
class Full:
    """A weight that the adapter holds whole, in place of the base's."""

    checkpoint: Checkpoint
    name: str
    whole: bool = False

    @property
    def shape(self) -> torch.Size:
        return self.checkpoint.info(self.name).shape

    def applied(self, weight: Tensor, start: int = 0) -> Tensor:
        return self.checkpoint.rows(self.name, start, start + (len(weight) if self.shape else 1)).to(_wide(weight).dtype)


@dataclass(frozen=True)
class Delta:
    """A low-rank update of a weight, and with a magnitude DoRA's.

        LoRA:  W + s B A                     A (r, in), B (out, r); the transpose of B A for weights stored (in, out)
        DoRA:  m (W + s B A) / |W + s B A|   norms over the inputs, one for each output

    Convolutions: A (r, in, height, width), B (out, r, 1, 1). Products are computed in float32.

    Args:
        down, up, magnitude: names of A, B and m in the adapter.
        scale: s, alpha / r, or alpha / sqrt(r) with rank-stabilized LoRA.
        transposed: whether the weight is stored (in, out), as those of embeddings and of GPT-2's Conv1D are.

    Source: "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685), "DoRA: Weight-Decomposed Low-Rank
    Adaptation" (arXiv 2402.09353), "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA" (arXiv 2312.03732).
    """

    checkpoint: Checkpoint
    down: str
    up: str
    magnitude: str | None
    scale: float
    transposed: bool

    @property
    def shape(self) -> torch.Size:
        inner, outer = self.checkpoint.info(self.down).shape[1:], self.checkpoint.info(self.up).shape[0]
        return torch.Size((*inner, outer) if self._turned else (outer, *inner))

    @property
    def whole(self) -> bool:
        """DoRA's norms run over the rows of weights that are stored (in, out)."""
        return self.magnitude is not None and self._turned

    @property
    def _turned(self) -> bool:
        return self.transposed and len(self.checkpoint.info(self.down).shape) == 2

    def fitting(self, shape: torch.Size) -> Delta:
        """This update for a weight of `shape`; transposed against what the config says if only so it fits.

        One flag stands for all modules, and models have linear layers of both kinds.
        """
        for delta in (self, replace(self, transposed=not self.transposed)):
            if delta.shape == shape:
                return delta
        problem = f"updates a weight of shape {list(self.shape)}, and the base's is {list(shape)}"
        cure = "it was trained on another base: see base_model_name_or_path in its config"
        raise CheckpointError(problem, cure=cure, file=self.checkpoint.path, tensor=self.down)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of s B A, in float32. No more than those of B, or columns of A, are multiplied."""
        down = self.checkpoint[self.down].float()
        if self._turned:
            return (down[:, start:stop].T @ self.checkpoint[self.up].float().T) * self.scale
        up = self.checkpoint.rows(self.up, start, stop).float()
        return (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:]) * self.scale

    def applied(self, weight: Tensor, start: int = 0) -> Tensor:
        stop = start + len(weight)
        moved = _wide(weight) + self.rows(start, stop)
        if self.magnitude is None:
            return moved
        magnitude = self.checkpoint[self.magnitude].to(moved.dtype).flatten()
        if self._turned:
            if weight.shape != self.shape:
                raise ValueError(f"DoRA on a weight stored (in, out) needs all of its {self.shape[0]} rows, not {len(weight)}")
            return moved * (magnitude / torch.linalg.vector_norm(moved, dim=0))
        norms = torch.linalg.vector_norm(moved.flatten(1), dim=1)
        ratio = magnitude[start:stop] / norms
        return moved * ratio.reshape(-1, *[1] * (moved.ndim - 1))


def _wide(weight: Tensor) -> Tensor:
    return weight if weight.dtype == torch.float64 else weight.float()
