"""Regression by a Gaussian process with one scalar kernel for all outputs: vectors predicted from vectors nearby.

    mu(x) = k(x, X) (K + noise I)^-1 Y,    K = k(X, X)

Every prediction is a weighted sum of the known vectors, so of long ones only their distances are needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def matern52(squares: Tensor, length_scale: float = 1.0) -> Tensor:
    """`(1 + r + r^2 / 3) exp(-r)` with `r = sqrt(5) d / length_scale`, for squared distances d^2; smooth to second order."""
    r = (5 * squares.clamp_min(0)).sqrt() / length_scale
    return (1 + r + r.square() / 3) * torch.exp(-r)


def regression_weights(known: Tensor, new: Tensor, noise: float) -> Tensor:
    """w, (q, n), with which `w Y` is the mean at q new points: `new (known + noise I)^-1`, solved in float64.

    Args:
        known: (n, n), the kernel between known points, symmetric.
        new: (q, n), between new and known ones.
        noise: variance of the known values, in units of the kernel at distance 0.

    Raises:
        ValueError: if the system is not positive definite, as it is without noise where a point is known twice. One that
            is not finite gives nan.
    """
    system = known.double() + noise * torch.eye(known.shape[-1], dtype=torch.float64, device=known.device)
    root, info = torch.linalg.cholesky_ex(system)
    if bool(info.any()) and bool(system.isfinite().all()):
        raise ValueError(f"noise={noise}: the kernel matrix is not positive definite; more noise, or fewer equal points")
    return torch.cholesky_solve(new.double().mT, root).mT


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """(q, n) of rows (q, d) and (n, d). By differences: steps of training are far smaller than weights are long."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()


def predict(X: Tensor, Y: Tensor, x: Tensor, length_scale: float = 1.0, noise: float = 1e-3) -> Tensor:
    """The mean at x, (q, outputs), given values Y, (n, outputs), at X, (n, d), with the Matern 5/2 kernel."""
    known, new = (matern52(squared_distances(points, X), length_scale) for points in (X, x))
    return regression_weights(known, new, noise).to(Y) @ Y


def best_length_scale(known: Tensor, new: Tensor, gram: Tensor, grid: Sequence[float], noise: float = 1e-3) -> float:
    """The length scale of the grid with which known vectors predict new ones best, in the sum of squared errors.

    Args:
        known: (n, n), squared distances between known points.
        new: (q, n), between new and known ones.
        gram: (n + q, n + q), inner products of the vectors at all of them, known ones first; nothing else of them is needed.
        grid: what is tried; the first of equally good ones is taken.

    Source: "OptEx: Expediting First-Order Optimization with Approximately Parallelized Iterations", whose code tries 0.1, 1, 10
    and 100 on gradients that were set aside.
    """
    best, least = grid[0], math.inf
    for length_scale in grid:
        w = regression_weights(matern52(known, length_scale), matern52(new, length_scale), noise)
        residual = torch.cat([w, -torch.eye(len(new), dtype=w.dtype, device=w.device)], 1)  # of the vectors: residual Y
        error = float((residual @ gram.to(w) * residual).sum())
        if error < least * (1 - 1e-9):
            best, least = length_scale, error
    return best


__all__ = ["best_length_scale", "matern52", "predict", "regression_weights", "squared_distances"]
