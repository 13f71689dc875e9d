"""Inverse roots `A^(-e)` of symmetric positive semidefinite matrices.

Float32 is the limit here, not the method: at a condition of 1e8, A^(-1/4) in float32 is off by some 10%, and at 1e12 nothing is
left of it. Matrices up to an order of 1024 are therefore taken apart in float64 whatever they come in.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Damping = Literal["floor", "add"]

SMALL = 1024  # orders up to which float64 costs little beside what it saves
GROWTH = 1.2  # of the residual in one iteration, from which on rounding has taken over


def inverse_root(A: Tensor, exponent: float, eps: float = 1e-12, damping: Damping = "floor") -> Tensor:
    r"""`A^(-exponent)` by an eigendecomposition.

        A = Q diag(l) Q^T;   l <- l + (eps - min l) if min l < eps  ("floor"),  or  l <- max(l, 0) + eps  ("add")
        result  Q diag(l^(-exponent)) Q^T

    With "floor", eps is at least max(l) times the machine epsilon of A's dtype: what lies below is rounding, not statistics.

    Args:
        A: (..., n, n), float32 or float64; the lower triangle is read.
        exponent: positive; 1/4 for the inverse fourth root.
        eps: not negative.

    A decomposition that fails in float32 is tried again in float64. A matrix that is not finite, or fails there too, gives nan.

    Raises:
        ValueError: for a setting that is none of these.

    Source: eps as in "A Distributed Data-Parallel PyTorch Implementation of the Distributed Shampoo Optimizer for Training
    Neural Networks At-Scale" (arXiv 2309.06497); its relation to max(l) is ours.
    """
    check_damping(eps, damping)
    if not exponent > 0:
        raise ValueError(f"exponent={exponent}: must be positive")
    finite = A.isfinite().all(-1).all(-1)[..., None, None]
    safe = torch.where(finite, A, torch.zeros_like(A))
    values, Q = _eigh(safe.double() if A.shape[-1] <= SMALL else safe)
    if damping == "add":
        values = values.clamp(min=0) + eps
    else:
        least = values[..., :1]
        floor = (values[..., -1:] * torch.finfo(A.dtype).eps).clamp(min=eps)
        values = torch.where(least < floor, values + (floor - least), values)
    root = (Q * values.pow(-exponent)[..., None, :]) @ Q.mT
    return torch.where(finite, root.to(A.dtype), torch.nan)


def coupled_newton(A: Tensor, p: int, ridge: float | Tensor = 0.0, tolerance: float = 1e-6, steps: int = 100) -> Tensor:
    r"""`(A + ridge I)^(-1/p)` by the coupled Newton iteration: products of matrices alone.

        z = (p + 1) / (2 ||A||_F);   X = z^(1/p) I;   M = z A
        T = ((1 + p) I - M) / p;   X <- X T;   M <- T^p M      until  max |M - I| < tolerance

    In exact arithmetic M goes to I. With rounding it comes near, then leaves: an iteration that makes the residual 1.2 times
    larger is taken back, and is the last. The precision is that of A's dtype; see the module.

    Args:
        A: (..., n, n), positive definite with its ridge; each of a batch stops on its own.
        p: an integer from 1 on.
        ridge: a number, or one for each matrix, (...).

    A matrix that is not finite gives nan.

    Source: "Scalable Second Order Optimization for Deep Learning" (arXiv 2002.09018), after Guo and Higham, "A Schur-Newton
    Method for the Matrix pth Root and its Inverse".
    """
    if p < 1 or p != int(p):
        raise ValueError(f"p={p}: must be an integer from 1 on")
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    A = A + torch.as_tensor(ridge, dtype=A.dtype, device=A.device)[..., None, None] * identity
    z = (p + 1) / (2 * torch.linalg.matrix_norm(A))[..., None, None]
    X, M = z ** (1 / p) * identity, z * A
    error = _residual(M, identity)
    going = error >= tolerance
    for _ in range(steps):
        if not bool(going.any()):
            break
        T = ((1 + p) * identity - M) / p
        nearer, closer = X @ T, torch.linalg.matrix_power(T, p) @ M
        found = _residual(closer, identity)
        taken = going & (found <= GROWTH * error)
        X, M = (torch.where(taken[..., None, None], new, old) for new, old in ((nearer, X), (closer, M)))
        error = torch.where(taken, found, error)
        going = taken & (error >= tolerance)
    return torch.where(A.isfinite().all(-1).all(-1)[..., None, None], X, torch.nan)


def check_damping(eps: float, damping: str) -> None:
    """Settings that `inverse_root` knows, or ValueError."""
    if not eps >= 0:
        raise ValueError(f"eps={eps}: must not be negative")
    if damping not in get_args(Damping):
        raise ValueError(f"damping={damping!r}: must be 'floor' or 'add'")


def _eigh(A: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues in rising order and eigenvectors; nan where LAPACK gives up in float64 too."""
    failed: type[Exception] = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]
    try:
        values, Q = torch.linalg.eigh(A)
        return values, Q
    except failed:
        pass
    try:
        values, Q = torch.linalg.eigh(A.double())
        return values.to(A.dtype), Q.to(A.dtype)
    except failed:
        return torch.full_like(A[..., 0], torch.nan), torch.full_like(A, torch.nan)


def _residual(M: Tensor, identity: Tensor) -> Tensor:
    return (M - identity).abs().amax((-2, -1))


__all__ = ["Damping", "check_damping", "coupled_newton", "inverse_root"]
