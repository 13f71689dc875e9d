"""Norms of matrices, their duals, and the direction that is best in each: one registry behind a few functions.

For a norm `||.||` and a matrix M, the linear minimization oracle gives the point of the unit ball that goes furthest along M,
`lmo(M) = argmax over ||X|| <= 1 of <M, X>`, and `<M, lmo(M)>` is the dual norm of M. The sharp operator is the same direction,
as long as M is in the dual norm: `sharp(M) = argmax of <M, X> - ||X||^2 / 2`. An optimizer subtracts them.

| norm       | value                           | dual       | lmo(M)                                          |
|------------|---------------------------------|------------|-------------------------------------------------|
| `l1`       | sum of absolute entries         | `linf`     | sign of the largest entry, zero elsewhere       |
| `l2`       | root of the sum of squares      | `l2`       | `M / ||M||`                                     |
| `linf`     | largest absolute entry          | `l1`       | `sign(M)`                                       |
| `spectral` | largest singular value          | `nuclear`  | polar factor, `U V^T` for `M = U diag(s) V^T`   |
| `nuclear`  | sum of singular values          | `spectral` | `u_1 v_1^T` of the largest singular value       |
| `l21`      | sum of the lengths of rows      | `l2inf`    | the longest row, of length 1, zero elsewhere    |
| `l2inf`    | length of the longest row       | `l21`      | each row, of length 1                           |

Largest entries (rows) that are equally large share the one unit, so that no order of the entries matters. A matrix of zeros
has the direction zero, which every norm allows. Leading dimensions are a batch; a vector is a matrix of one row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import polar
from .newton_schulz import Form

Polar = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Norm:
    """One norm of the last two dimensions.

    Args:
        value: (..., rows, columns) to (...).
        dual: name of its dual norm.
        best: lmo of matrices in float32 or float64; only `spectral` uses the orthogonalizer it is given.
    """

    value: Callable[[Tensor], Tensor]
    dual: str
    best: Callable[[Tensor, Polar], Tensor]


def value(M: Tensor, norm: str) -> Tensor:
    """The norm of each matrix, shape (...), in float32 or float64; nan of a matrix with nan.

    Raises:
        ValueError: an unknown norm, or fewer than two dimensions. TypeError: M is not a real floating-point tensor.
    """
    M = _checked(M, norm, "value")
    if M.numel() == 0:
        return M.new_zeros(M.shape[:-2])
    return NORMS[norm].value(M)


def dual(M: Tensor, norm: str) -> Tensor:
    """The norm's dual, `max over ||X|| <= 1 of <M, X>`; as `value`. `inner(M, lmo(M, ...))` is cheaper for `spectral`."""
    check_norm(norm)
    return value(M, NORMS[norm].dual)


def lmo(
    M: Tensor,
    norm: str,
    method: str = "polar_express",
    *,
    steps: int | None = None,
    form: Form = "auto",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The point of the norm's unit ball that goes furthest along each matrix.

    Scale makes no difference. A matrix with nan or infinity gives nan where its direction depends on that entry.

    Args:
        M: shape (..., rows, columns). Not modified.
        norm: a name in `NORMS`.
        method, steps, form, dtype: of the polar factor, see `poise.linalg.polar.orthogonalize`; used by `spectral` only.

    Returns:
        Tensor of the shape and dtype of M.

    Raises:
        ValueError, TypeError: as `value`, and for options that `orthogonalize` does not know.
    """
    polar.check_options(method, steps, form, dtype)
    X = _checked(M, norm, "lmo")
    if M.numel() == 0:
        return torch.zeros_like(M)
    return NORMS[norm].best(X, lambda Y: polar.orthogonalize(Y, method, steps=steps, form=form, dtype=dtype)).to(M.dtype)


def sharp(
    M: Tensor,
    norm: str,
    method: str = "polar_express",
    *,
    steps: int | None = None,
    form: Form = "auto",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`<M, O> O` with `O = lmo(M)`: the direction of `lmo`, as long as M is in the dual norm. Arguments are those of `lmo`.

    With an inexact polar factor `<M, O>` is what O attains of the nuclear norm.
    """
    X = _checked(M, norm, "sharp")
    O = lmo(X, norm, method, steps=steps, form=form, dtype=dtype)
    return (inner(X, O)[..., None, None] * O).to(M.dtype)


def inner(A: Tensor, B: Tensor) -> Tensor:
    """`<A, B>` of each pair of matrices: the sum of products of entries, shape (...)."""
    return torch.linalg.vecdot(A.flatten(-2), B.flatten(-2))


def check_norm(norm: str) -> None:
    """Raise ValueError for a norm that is not in the registry, so that a rule can fail when it is built."""
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r}: unknown; known: {', '.join(NORMS)}")


def _checked(M: Tensor, norm: str, function: str) -> Tensor:
    """M in the dtype of the arithmetic."""
    check_norm(norm)
    if not M.is_floating_point():
        raise TypeError(f"{function}(M): M must be a real floating-point tensor, got {M.dtype}")
    if M.ndim < 2:
        raise ValueError(f"{function}(M): M must have at least two dimensions, got shape {tuple(M.shape)}")
    return M.to(torch.promote_types(M.dtype, torch.float32))


def _length(M: Tensor, dim: tuple[int, ...]) -> Tensor:
    return torch.linalg.vector_norm(M, dim=dim)


def _singular_values(M: Tensor) -> Tensor:
    finite = M.isfinite().all(-1).all(-1)  # LAPACK gives up on a batch with one nan
    values = torch.linalg.svdvals(torch.where(finite[..., None, None], M, 0.0))
    return torch.where(finite[..., None], values, torch.nan)


def _largest_entry(M: Tensor, orthogonal: Polar) -> Tensor:
    size = M.abs()
    largest = size == size.amax((-2, -1), keepdim=True)
    return M.sign() * largest / largest.sum((-2, -1), keepdim=True)


def _unit(M: Tensor, orthogonal: Polar) -> Tensor:
    X = polar.near_one(M)
    return X / _length(X, (-2, -1))[..., None, None].clamp_min(1.0)  # only zero is shorter than 1 here


def _leading(M: Tensor, orthogonal: Polar) -> Tensor:
    X = polar.near_one(M)
    finite = X.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    U, s, Vh = torch.linalg.svd(torch.where(finite, X, 0.0), full_matrices=False)
    return torch.where(finite, U[..., :1] @ Vh[..., :1, :] * (s[..., :1, None] > 0), torch.nan)


def _unit_rows(M: Tensor, orthogonal: Polar) -> Tensor:
    # one by one, since a row far below the largest would vanish beside it
    return _unit(M.unsqueeze(-2), orthogonal).squeeze(-2)


def _longest_row(M: Tensor, orthogonal: Polar) -> Tensor:
    X = polar.near_one(M)
    length = _length(X, (-1,)).unsqueeze(-1)
    longest = length == length.amax(-2, keepdim=True)
    return X * longest / (longest.sum(-2, keepdim=True) * length.clamp_min(1.0))


NORMS: dict[str, Norm] = {
    "l1": Norm(lambda M: M.abs().sum((-2, -1)), "linf", _largest_entry),
    "l2": Norm(lambda M: _length(M, (-2, -1)), "l2", _unit),
    "linf": Norm(lambda M: M.abs().amax((-2, -1)), "l1", lambda M, orthogonal: M.sign()),
    "spectral": Norm(lambda M: _singular_values(M).amax(-1), "nuclear", lambda M, orthogonal: orthogonal(M)),
    "nuclear": Norm(lambda M: _singular_values(M).sum(-1), "spectral", _leading),
    "l21": Norm(lambda M: _length(M, (-1,)).sum(-1), "l2inf", _longest_row),
    "l2inf": Norm(lambda M: _length(M, (-1,)).amax(-1), "l21", _unit_rows),
}

__all__ = ["NORMS", "Norm", "check_norm", "dual", "inner", "lmo", "sharp", "value"]
