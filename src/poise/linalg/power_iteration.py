"""A matrix as a product of two thin ones: a step of power iteration, begun where the last one ended."""

from __future__ import annotations

import torch
from torch import Tensor


def power_step(M: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """P with orthonormal columns and a new Q, so that `P Q^T = P P^T M` is near M.

    P = orthonormal columns of `M Q`, `Q = M^T P`. Iterated on one M, P spans its leading left singular vectors; if Q has as
    many columns as M has rank, and sees all of it, `P Q^T` is M.

    Args:
        M: (..., rows, columns). Q: (..., columns, r), r at most rows. Columns of Q that M takes to zero do no harm: Householder
            reflections put others in the place of what they give.

    Source: the compression of "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization" (arXiv
    1905.13727).
    """
    P = torch.linalg.qr(M @ Q).Q
    return P, M.mT @ P


__all__ = ["power_step"]
