"""Lengths of rows and columns, and vectors brought to length 1."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """`x` in float32, or as it is if it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def lengths(x: Tensor, dim: int, floor: float = 1e-12) -> Tensor:
    """Euclidean norms along `dim`, which stays as a dimension of 1; at least `floor`."""
    return torch.linalg.vector_norm(x, dim=dim, keepdim=True).clamp_min(floor)


def unit(x: Tensor, dim: int = -1, floor: float = 1e-12) -> Tensor:
    """`x / max(||x||, floor)` along `dim`, in the dtype of `x`, computed in float32 or better."""
    return (wide(x) / lengths(wide(x), dim, floor)).to(x.dtype)
