"""The Kalman filter's update as descent: the matrix with which K gradient steps on an observation are its posterior mean."""

from __future__ import annotations

import torch
from torch import Tensor


def step_matrix(P: Tensor, H: Tensor, R: Tensor | None = None, steps: int = 1) -> Tensor:
    """The M of `w <- w - M H^T R^-1 (H w - y)` for which that many steps from the prior mean end at the posterior mean.

        P = C C^T, R = S S^T, S^-1 H C = U diag(sqrt p) Z^T, X = C Z      so that X^T P^-1 X = 1, X^T H^T R^-1 H X = diag(p)
        M = X diag(lam) X^T,  lam_i = (1 - (1 + p_i)^(-1/K)) / p_i

    What no observation sees, p = 0, takes the limit lam = 1/K, which does not matter for w. M is a covariance, (n, n): for
    K = 1 that of the posterior.

    Args:
        P: covariance of the prior, (..., n, n), symmetric and positive definite.
        H: the linear observation y = H w, (..., m, n).
        R: covariance of its noise, (..., m, m); None: the identity.
        steps: K.

    Raises:
        ValueError: naming the argument whose shape does not fit or which is not positive definite.

    Source: "Implicit Maximum a Posteriori Filtering via Adaptive Optimization" (arXiv 2311.10580), whose code takes R = 1 and
    decomposes P^-1 and H^T H. Neither is formed here, so small p keep their digits and none comes out below zero.
    """
    n, m = P.shape[-1], H.shape[-2]
    if steps < 1:
        raise ValueError(f"steps={steps}: must be at least 1")
    for name, matrix, shape in (("P", P, (n, n)), ("H", H, (m, n)), ("R", R, (m, m))):
        if matrix is not None and tuple(matrix.shape[-2:]) != shape:
            raise ValueError(f"{name}: shape {tuple(matrix.shape)} does not fit; its last two dimensions must be {shape}")
    C = _root("P", P)
    Y = H @ C if R is None else torch.linalg.solve_triangular(_root("R", R), H @ C, upper=False)
    _, sigma, Zt = torch.linalg.svd(Y, full_matrices=True)
    p = torch.nn.functional.pad(sigma.square(), (0, n - sigma.shape[-1]))
    safe = torch.where(p > 0, p, 1.0)
    # log1p and expm1: for small p the difference from 1 would lose what the division brings back
    lam = torch.where(p > 0, -torch.expm1(-torch.log1p(safe) / steps) / safe, 1.0 / steps)
    X = C @ Zt.mT
    return X * lam[..., None, :] @ X.mT


def descend(w: Tensor, y: Tensor, M: Tensor, H: Tensor, R: Tensor | None = None, steps: int = 1) -> Tensor:
    """`steps` times `w <- w - M H^T R^-1 (H w - y)`, for w (..., n) and y (..., m)."""
    root = None if R is None else _root("R", R)
    for _ in range(steps):
        error = (H @ w[..., None]) - y[..., None]
        weighted = error if root is None else torch.cholesky_solve(error, root)
        w = w - (M @ (H.mT @ weighted))[..., 0]
    return w


def _root(name: str, matrix: Tensor) -> Tensor:
    root, info = torch.linalg.cholesky_ex(matrix)
    if bool(info.any()):
        raise ValueError(f"{name}: must be symmetric and positive definite")
    return root


__all__ = ["descend", "step_matrix"]
