"""Damped low-rank solves: `(lam I + c G^T G)^(-1) x` for a few long rows G, without a matrix of their length.

By Woodbury's identity only a system of the number of rows is solved:

    (lam I + c G^T G)^(-1) x  =  ( x - G^T ((lam / c) I + G G^T)^(-1) G x ) / lam

An empirical Fisher of m gradients is `c = 1 / m`; a sum of them, `c = 1`. The order of the rows makes no difference, and rows
of zeros add nothing.

Where x is itself one of the rows, as the newest gradient is in its own Fisher, the difference above cancels all but a part
`lam / |x|^2` of x, which in float32 leaves nothing. `row_weights` gives the same vector as a sum of rows, without a difference.
"""

from __future__ import annotations

import torch
from torch import Tensor


def damped_solve(G: Tensor, x: Tensor, lam: float, c: float = 1.0) -> Tensor:
    """`(lam I + c G^T G)^(-1) x`, shape of x.

    Args:
        G: (..., m, d), m rows.
        x: (..., d).
        lam, c: positive; see the module.

    Raises:
        ValueError: shapes that do not fit, or lam or c not positive.
    """
    if G.shape[-1:] != x.shape[-1:]:
        raise ValueError(f"damped_solve(G, x): rows of G have length {G.shape[-1:]}, x has {x.shape[-1:]}")
    z = coefficients(G @ G.mT, (G @ x[..., None])[..., 0], lam, c)
    return (x - (G.mT @ z[..., None])[..., 0]) / lam


def coefficients(gram: Tensor, dots: Tensor, lam: float, c: float = 1.0) -> Tensor:
    """z with `(lam I + c G^T G)^(-1) x = (x - G^T z) / lam`, from the products alone: `((lam / c) I + gram) z = dots`.

    For rows that are kept in another form, sparse or as factors, or whose products are kept from step to step.

    Args:
        gram: `G G^T`, (..., m, m), symmetric; its lower triangle is read. dots: `G x`, (..., m).

    Solved in float64, because the gradients of one model are alike, by Cholesky. Where rounding of the products, in the dtype
    of `gram`, has left a matrix that is not positive definite, by eigenvalues, without those that are nothing but rounding.
    What is not finite gives nan.
    """
    if not lam > 0 or not c > 0:
        raise ValueError(f"lam={lam}, c={c}: both must be positive")
    return _solve(gram, dots, lam / c)


def row_weights(gram: Tensor, row: int, lam: float, c: float = 1.0) -> Tensor:
    """w with `(lam I + c G^T G)^(-1) g = G^T w` for g a row of G: `c ((lam / c) I + gram) w = e_row`.

    Args:
        gram: `G G^T`, (..., m, m). row: which of them g is.
    """
    if not lam > 0 or not c > 0:
        raise ValueError(f"lam={lam}, c={c}: both must be positive")
    unit = torch.zeros(gram.shape[:-1], dtype=gram.dtype, device=gram.device)
    unit[..., row] = 1 / c
    return _solve(gram, unit, lam / c)


def _solve(gram: Tensor, right: Tensor, shift: float) -> Tensor:
    rounding = gram.shape[-1] * torch.finfo(gram.dtype).eps
    gram = gram.double()
    finite = gram.isfinite().all(-1, keepdim=True).all(-2)
    system = gram + shift * torch.eye(gram.shape[-1], dtype=torch.float64, device=gram.device)
    L, info = torch.linalg.cholesky_ex(torch.where(finite[..., None], system, shift))
    if bool(((info != 0) & finite[..., 0]).any()):  # nearly equal rows in float32
        e, V = torch.linalg.eigh(torch.where(finite[..., None], gram, 0.0))
        inverse = torch.where(e > rounding * e[..., -1:], 1 / (e + shift), 0.0)
        z = (V @ (inverse[..., None] * (V.mT @ right.double()[..., None])))[..., 0]
    else:
        z = torch.cholesky_solve(right.double()[..., None], L)[..., 0]
    return torch.where(finite, z, torch.nan).to(right.dtype)


__all__ = ["coefficients", "damped_solve", "row_weights"]
