"""Where a sequence of vectors is going: regularized minimal-polynomial extrapolation."""

from __future__ import annotations

import torch
from torch import Tensor


def limit_weights(gram: Tensor, ridge: float = 1e-8) -> Tensor:
    """Weights c, summing to 1, with which `sum_i c_i x_i` extrapolates x_0, ..., x_r to their limit.

    With the differences `u_i = x_{i+1} - x_i` as columns of U: `(U^T U + ridge ||U^T U||_2 I) c = 1`, then `c / sum(c)`, the
    weights of least `||U c||`. Exact for `x <- A x + b` as ridge goes to 0, where the differences span at most r - 1
    dimensions. Differences of zero give equal weights.

    Args:
        gram: (r, r), `U^T U`. Sums over pieces of the vectors may be added up.
        ridge: relative to the largest eigenvalue, so that the scale of the sequence makes no difference.

    Returns:
        (r,), float64, for x_0 to x_{r-1}.

    Source: "Regularized Nonlinear Acceleration", arXiv 1606.04133.
    """
    G = gram.double()
    largest = torch.linalg.eigvalsh(G)[-1]
    flat = largest <= 0
    G = torch.where(flat, torch.zeros_like(G), G / torch.where(flat, 1.0, largest))
    shift = torch.where(flat, 1.0, ridge) * torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    c = torch.linalg.solve(G + shift, torch.ones(G.shape[-1], dtype=G.dtype, device=G.device))
    return c / c.sum()
