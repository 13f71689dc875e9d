"""Eigenvectors of symmetric matrices that drift slowly: found once, then followed by one cheap step at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def eigenbasis(S: Tensor) -> Tensor:
    """Eigenvectors of symmetric positive semidefinite matrices, as columns, that of the largest eigenvalue first.

    Of the eigenvectors to an eigenvalue that stands several times, zero in a matrix of low rank above all, any basis may come
    out. A matrix that is not finite gives nan.

    Args:
        S: shape (..., n, n), float32 or float64. Of each matrix the lower triangle is read.
    """
    finite = S.isfinite().all(-1).all(-1)[..., None, None]
    safe = torch.where(finite, S, torch.zeros_like(S))
    try:
        Q = torch.linalg.eigh(safe).eigenvectors
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        # LAPACK's float32 iteration may fail to converge on clustered eigenvalues
        Q = torch.linalg.eigh(safe.double()).eigenvectors.to(S.dtype)
    return torch.where(finite, Q.flip(-1), torch.nan)


def power_step(S: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """Bring an orthogonal basis nearer to the eigenvectors of `S`, by one step of orthogonal iteration.

        e = diag(Q^T S Q);  Q <- columns of Q in falling order of e;  Q <- the orthogonal factor of S Q (Householder QR)

    The order matters: a QR factorization leaves the first column pointing where it did, and turns the later ones away from
    those before them.

    Args:
        S: symmetric, (..., n, n). Q: orthogonal, of the same shape and dtype.

    Returns:
        The new basis, and the order (..., n) that its columns were put in: column j comes from column order[j].
    """
    product = S @ Q
    order = (Q * product).sum(-2).argsort(dim=-1, descending=True, stable=True)
    ordered = product.gather(-1, order[..., None, :].expand_as(product))
    return torch.linalg.qr(ordered).Q, order


def rectify(V: Tensor, steps: int) -> Tensor:
    """Bring a nearly orthogonal matrix nearer to orthogonality: `V <- 1.5 V - 0.5 V V^T V`, by Björck's iteration.

    The distance `||V^T V - I||` is squared in each step, up to a factor of 3/4, where it is below 1.

    Args:
        V: (..., n, n).
    """
    for _ in range(steps):
        V = 1.5 * V - 0.5 * V @ (V.mT @ V)
    return V


__all__ = ["eigenbasis", "power_step", "rectify"]
