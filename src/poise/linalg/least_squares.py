"""Linear least squares of any rank and in any units: columns are scaled alike before it is said what is zero."""

from __future__ import annotations

import torch
from torch import Tensor


def least_squares(A: Tensor, B: Tensor) -> Tensor:
    """The `X` of `min ||A X - B||`; of several the one of least norm, with columns of A scaled to length 1."""
    scale = _nonzero(torch.linalg.vector_norm(A, dim=0))
    Q, R = torch.linalg.qr(A / scale)
    return (torch.linalg.pinv(R, rtol=_tolerance(A)) @ (Q.mT @ B)) / scale[:, None]


def symmetric_pinv(M: Tensor) -> Tensor:
    """Inverse of a positive semi-definite matrix, of what there is of it, with its diagonal scaled to 1."""
    scale = _nonzero(M.diagonal().clamp_min(0).sqrt())
    outer = scale[:, None] * scale
    return torch.linalg.pinv(M / outer, rtol=_tolerance(M), hermitian=True) / outer


def _nonzero(scale: Tensor) -> Tensor:
    """1 in the place of 0."""
    return torch.where(scale > 0, scale, 1.0)


def _tolerance(M: Tensor) -> float:
    """Below this share of the largest, a singular value is rounding."""
    return max(M.shape) * torch.finfo(M.dtype).eps
