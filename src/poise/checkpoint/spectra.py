"""Singular values of a tensor as a matrix, and what they say of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from poise.linalg import singular_values

EXACT, GRAM, FEW = 768, 4096, 16  # shorter side up to which LAPACK, and the Gram matrix, are asked; else so many values
DROWNED = 1e7  # condition numbers above this are not told by a Gram matrix


@dataclass(frozen=True)
class Spectrum:
    """Of a matrix W with singular values s_1 >= s_2 >= ... >= s_k, k the shorter side.

    Attributes:
        values: those known, largest first.
        spectral: s_1.
        stable_rank: `||W||_F^2 / s_1^2`.
        effective_rank: exponential of the entropy of `s_i / sum s` (Roy and Vetterli, 2007); None where not all are known.
        condition: `s_1 / s_k`, infinite where the matrix is singular; None where s_k is not known. From a Gram matrix, a value
            of 1e7 means: at least that.
        method: "svd", "gram" or "lanczos", see `poise.linalg.singular_values`.
        place: number of the matrix in a stack; None for a single one.
    """

    values: tuple[float, ...]
    spectral: float
    stable_rank: float
    effective_rank: float | None
    condition: float | None
    method: str
    place: int | None = None


def method_for(shorter: int) -> str:
    """Which method is used. For a square matrix of 768 "svd" takes about a second on one core, of 4096 "gram" about a minute,
    of 16384 "lanczos" half a minute."""
    return "svd" if shorter <= EXACT else "gram" if shorter <= GRAM else "lanczos"


def spectrum(W: Tensor, method: str | None = None) -> Spectrum | None:
    """The spectrum of W (m, n), or (out, in, ...) taken as (out, in * ...); None of complex W, of no entries, and if one is not
    finite.

    Args:
        method: "svd", "gram" or "lanczos"; by default by size.
    """
    if W.is_complex() or not W.numel():
        return None
    M = W.reshape(len(W), -1) if W.ndim > 1 else W.reshape(1, -1)
    if not M.is_floating_point():
        M = M.double()
    if not bool(M.isfinite().all()):
        return None
    method = method or method_for(min(M.shape))
    squares = float(torch.linalg.vector_norm(M, dtype=torch.float64)) ** 2
    if method == "svd":
        values = singular_values.exact(M)
    elif method == "gram":
        values = singular_values.gram(M)
    elif method == "lanczos":
        values = singular_values.lanczos(M, FEW)
    else:
        raise ValueError(f"method={method!r}: allowed are 'svd', 'gram' and 'lanczos'")
    values = values.double()
    largest, smallest = float(values[0]), float(values[-1])
    if largest == 0:
        return Spectrum(tuple(values.tolist()), 0.0, math.nan, None, math.inf, method)
    effective = condition = None
    if method != "lanczos":
        shares = values / values.sum()
        effective = math.exp(float(torch.special.entr(shares).sum()))
        tiny = max(M.shape) * torch.finfo(torch.float64).eps * largest
        condition = largest / smallest if smallest > tiny else math.inf
        if method == "gram":
            condition = min(condition, DROWNED)
    return Spectrum(tuple(values.tolist()), largest, squares / largest**2, effective, condition, method)


def stacked(W: Tensor, method: str | None = None) -> Spectrum | None:
    """Of a stack (count, m, n), the spectrum of the matrix that is conditioned worst; the first of equals."""
    worst: Spectrum | None = None
    for place, matrix in enumerate(W):
        found = spectrum(matrix, method)
        if found is None:
            return None
        if worst is None or (found.condition or 0.0) > (worst.condition or 0.0):
            worst = replace(found, place=place)
    return worst
