"""Passthrough: what stacks of layers are made of."""

from __future__ import annotations

from torch import Tensor

from ..protocol import Each


def passthrough(tensors: list[Tensor], base: Tensor | None, *, scale: Each[float] = 1.0) -> Tensor:
    """One model's tensor as it is, or times `scale`: W = scale * W_1.

    No paper's method: with `slices` it stacks layers of several models ("frankenmerge"). mergekit's name and setting.
    """
    if len(tensors) != 1:
        raise ValueError(f"passthrough takes one model for each tensor, not {len(tensors)}")
    factor = scale[0] if isinstance(scale, tuple) else scale
    return tensors[0] if factor == 1.0 else tensors[0] * factor
