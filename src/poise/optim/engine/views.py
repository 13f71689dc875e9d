"""Whole parameters as a link sees them: matrices with outputs as rows, however they are stored."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ..transform import Param


def view_of(unit: str, p: Param, t: Tensor) -> Tensor:
    """A whole tensor (behind any batch dimension) as a link of this unit sees it.

    A matrix rule sees a convolution as (out, in * kernel), stacked experts as that many matrices, and what is stored inputs
    first turned round.
    """
    if unit != "matrix" or len(p.shape) < 2:
        return t
    if p.role == "experts":
        return t.mT if p.inputs_first else t
    batch = t.ndim - len(p.shape)
    if p.inputs_first:
        t = t.movedim(batch + 1, batch)
    return t.reshape(*t.shape[: batch + 1], math.prod(t.shape[batch + 1 :]))


def stored_as(unit: str, p: Param, t: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `view_of`, for a tensor that is stored in `shape`."""
    if unit != "matrix" or len(p.shape) < 2 or not p.inputs_first:
        return t.reshape(tuple(shape))
    if p.role == "experts":
        return t.mT.reshape(tuple(shape))
    batch = len(shape) - len(p.shape)
    return t.reshape(*shape[:batch], shape[batch + 1], shape[batch], *shape[batch + 2 :]).movedim(batch, batch + 1)
