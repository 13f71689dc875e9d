"""A layer's weight as a matrix with one row for each output, however the layer stores it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd


@dataclass(frozen=True)
class Rows:
    """A weight seen as a matrix (outputs, rest), one row for each output unit.

    Args:
        outputs: the number of rows.
        groups: of a weight stored inputs first, (in, out / groups, ...), as transposed convolutions are; 0: outputs first.
    """

    outputs: int
    groups: int = 0

    @classmethod
    def of(cls, layer: nn.Module, weight: Tensor) -> Rows:
        """The rows of `weight` in `layer`."""
        if isinstance(layer, _ConvTransposeNd):
            return cls(weight.shape[1] * layer.groups, layer.groups)
        if weight.ndim == 2 and not hasattr(layer, "out_features") and getattr(layer, "nf", None) == weight.shape[1]:
            return cls(weight.shape[1], 1)  # Conv1D of transformers: y = x W + b
        return cls(weight.shape[0])

    def view(self, weight: Tensor) -> Tensor:
        """`weight` as (outputs, rest)."""
        if not self.groups:
            return weight.flatten(1)
        return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).reshape(self.outputs, -1)

    def stored(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """The weight of `shape` whose view is `rows`."""
        if not self.groups:
            return rows.reshape(shape)
        turned = (self.groups, shape[1], shape[0] // self.groups, *shape[2:])
        return rows.reshape(turned).transpose(1, 2).reshape(shape)
