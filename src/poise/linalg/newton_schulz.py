"""Orthogonalization by odd polynomials: matrix products only, fast on every device and in half precision.

One step is `X <- a X + (b A + c A^2) X` with `A = X X^T`. It sends each singular value s to `a s + b s^3 + c s^5` and leaves
the singular vectors alone, so one method differs from another only in its triples (a, b, c) and in how it starts.

`A` is taken on the shorter side: of a tall matrix it is `X^T X`, and a step is `X <- a X + X (b A + c A^2)`. To transpose the
matrix instead, there and back, would take as long as one of the products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Form = Literal["plain", "gram", "auto"]
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class NewtonSchulz:
    """A sequence of quintic steps.

    Args:
        triples: (a, b, c) of each step; more steps repeat the last one.
        steps: how many by default.
        start: "frobenius" divides by the norm, "aol" scales each row (`almost_orthogonal_rows`).
        margin: the start divides by this multiple of the norm.
        tail: whether fewer steps drop the first triples instead of the last ones.
    """

    triples: tuple[Triple, ...]
    steps: int
    start: Literal["frobenius", "aol"] = "frobenius"
    margin: float = 1.0
    tail: bool = False

    def schedule(self, steps: int) -> list[Triple]:
        chosen = self.triples[-steps:] if self.tail else self.triples[:steps]
        return [*chosen, *[self.triples[-1]] * (steps - len(chosen))]

    def __call__(self, X: Tensor, steps: int | None, form: Form, dtype: torch.dtype) -> Tensor:
        """`X`: a contiguous batch of matrices, each zero or with a largest entry of at least 1, in float32 or float64.

        It is overwritten: on a CPU fresh memory costs more than what is computed in it.
        """
        schedule = self.schedule(self.steps if steps is None else steps)
        # Only zero has a norm below 1 here.
        X = X.div_(self.margin * torch.linalg.matrix_norm(X, keepdim=True).clamp_min(1.0)).to(dtype)
        single = len(X) == 1
        if single:  # a plain product has less to set up than a batch of one
            X = X[0]
        A = gram_matrix(X)
        if self.start == "aol":
            s = almost_orthogonal_rows(A)
            X, A = X.mul_(s.mT if is_tall(X) else s), s * A * s.mT
        uneven = max(X.shape[-2:]) >= 2 * min(X.shape[-2:]) and dtype != torch.bfloat16
        if form == "gram" or (form == "auto" and uneven):
            X = gram(X, A, schedule, restarts(len(schedule), dtype))
        else:
            X = plain(X, A, schedule)
        return X[None] if single else X


def is_tall(X: Tensor) -> bool:
    """Whether the columns are the shorter side."""
    return X.shape[-2] > X.shape[-1]


def gram_matrix(X: Tensor) -> Tensor:
    """`X X^T`, of a tall matrix `X^T X`."""
    return X.mT @ X if is_tall(X) else X @ X.mT


def almost_orthogonal_rows(A: Tensor) -> Tensor:
    """Row scales `s_i = (sum_j |A_ij|)^(-1/2)` of a Gram matrix `A = X X^T`, shape (..., rows, 1).

    `||diag(s) X||_2 <= 1` for every X (Gershgorin), and `diag(s) X` is already orthogonal if the rows of X are, whatever their
    lengths. Source: "Almost-Orthogonal Layers for Efficient General-Purpose Lipschitz Networks", arXiv 2208.03160.
    """
    return A.abs().sum(-1, keepdim=True).clamp_min(torch.finfo(A.dtype).tiny).rsqrt()


def restarts(steps: int, dtype: torch.dtype) -> tuple[int, ...]:
    """After which steps the Gram form multiplies its product into X and forms the Gram matrix anew.

    Rounding gives a Gram matrix eigenvalues below zero, where its matrix has singular values near zero, and a step multiplies
    them by up to a^2, 68 for the first of `polar_express`: left alone they end in infinity. So segments have at most 3 steps,
    in float16 2, as equal as can be, longer ones first: 5 steps restart after 3, in float16 after 2 and 4. No matrix of any
    rank then ended above 1.13 (1.21 for `ns5`), as in the plain form. In bfloat16, which rounds 65536 times as coarsely as
    float32, even two steps threw matrices of 10 x 40 to 1e5: every step is a segment, which saves nothing.
    """
    if dtype == torch.bfloat16:
        return tuple(range(1, steps))
    if steps < 3:
        return ()
    segments = max(2, math.ceil(steps / (2 if dtype == torch.float16 else 3)))
    return tuple(math.ceil(i * steps / segments) for i in range(1, segments))


def plain(X: Tensor, A: Tensor, schedule: list[Triple]) -> Tensor:
    """Every step on X itself; the Gram matrix A of the first one is given."""
    for i, (a, b, c) in enumerate(schedule):
        if i > 0:
            A = gram_matrix(X)
        B = _plus_product(A, A, A, b, c)
        X = _plus_product(X, X, B, a) if is_tall(X) else _plus_product(X, B, X, a)
    return X


def gram(X: Tensor, R: Tensor, schedule: list[Triple], restart_after: tuple[int, ...]) -> Tensor:
    """The same steps on `R = X X^T` alone, while Q collects what X is multiplied by once per segment.

    With `Z = b R + c R^2` a step is `Q <- Q (a I + Z)`, `R <- (a I + Z) R (a I + Z)`. For rows r and columns c = rho r it costs
    3 or 4 products of size r^3 where the plain one costs 1 + 2 rho: less from rho = 1.5. (Of a tall matrix, r columns.)
    """
    Q: Tensor | None = None
    for i, (a, b, c) in enumerate(schedule, start=1):
        Z = _plus_product(R, R, R, b, c)
        if Q is None:
            Q = Z.clone()
            Q.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            Q = _plus_product(Q, Q, Z, a)
        if i == len(schedule) or i in restart_after:
            X, Q = X @ Q.mT if is_tall(X) else Q @ X, None
        if i in restart_after:
            R = gram_matrix(X)
        elif i < len(schedule):
            R = _plus_product(R, R, Z, a)
            R = _plus_product(R, Z, R, a)
    return X


def _plus_product(C: Tensor, A: Tensor, B: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
    """`beta C + alpha A B`, summed in the accumulator of the product: one pass and one rounding."""
    return (torch.addmm if C.ndim == 2 else torch.baddbmm)(C, A, B, beta=beta, alpha=alpha)
