"""Symmetric polynomials of a matrix's eigenvalues, and the matrix polynomials whose eigenvalues are those of all *others*.

With e_k the k-th elementary symmetric polynomial of the eigenvalues lambda_1 >= ... >= lambda_n >= 0 of B,

    P_0 = I,    P_k = e_k I - B P_{k-1}:    eigenvalue i is e_k of all lambda but lambda_i

and so P_1 = tr(B) I - B, P_{n-1} = det(B) B^-1. In B P_k the gaps between the k largest eigenvalues are closed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

Matrix = Tensor | Callable[[Tensor], Tensor]  # (n, n), or its product with a vector like x


Form = Literal["horner", "recursion", "eigenvalues"]


def as_product(B: Matrix) -> Callable[[Tensor], Tensor]:
    """`B v` for vectors v."""
    return (lambda v: B @ v) if isinstance(B, Tensor) else B


def polynomial(B: Tensor, tau: int, form: Form = "horner") -> Tensor:
    """`P_tau` of a symmetric (n, n) B, written out.

    "horner" as above; "recursion" `P_k = 1/k sum over i = 1 ... k of (-1)^(i-1) P_{k-i} (tr(B^i) I - B^i)`; "eigenvalues" by
    decomposition: sums of positive terms only for a positive B, and so the exact one.
    """
    one = torch.eye(len(B), dtype=B.dtype, device=B.device)
    if form == "eigenvalues":
        values, vectors = torch.linalg.eigh(B)
        others = []
        for i in range(len(B)):
            e = torch.zeros(tau + 1, dtype=B.dtype, device=B.device)
            e[0] = 1
            for value in torch.cat([values[:i], values[i + 1 :]]):
                e = torch.cat([e[:1], e[1:] + value * e[:-1]])
            others.append(e[tau])
        return vectors @ torch.diag(torch.stack(others)) @ vectors.mT
    if form not in get_args(Form):
        raise ValueError(f"form={form!r}: must be one of {', '.join(get_args(Form))}")
    powers = [one]
    for _ in range(tau):
        powers.append(powers[-1] @ B)
    traces = torch.stack([power.trace() for power in powers])
    P = [one]
    for k in range(1, tau + 1):
        if form == "horner":
            P.append(elementary(traces[1:])[k] * one - B @ P[-1])
        else:
            P.append(sum(((-1) ** (i - 1) * P[k - i] @ (traces[i] * one - powers[i]) for i in range(1, k + 1)), 0 * one) / k)
    return P[tau]


def elementary(sums: Tensor) -> Tensor:
    """e_0, ..., e_k of numbers whose power sums p_1, ..., p_k are given, by Newton's identities.

    i e_i = sum over j = 1 ... i of (-1)^(j-1) e_{i-j} p_j
    """
    found = [torch.ones_like(sums[:1].sum())]
    for i in range(1, len(sums) + 1):
        terms = [(-1) ** (j - 1) * found[i - j] * sums[j - 1] for j in range(1, i + 1)]
        found.append(torch.stack(terms).sum() / i)
    return torch.stack(found)


def power_sums(B: Matrix, like: Tensor, k: int, probes: int | None = None, generator: torch.Generator | None = None) -> Tensor:
    """`tr(B), ..., tr(B^k)` of a symmetric B, in float64.

    Args:
        B: a matrix, or its product with vectors like `like`.
        like: gives shape, dtype and device of such vectors.
        probes: None for the exact traces, from one column after another: n k products, or those of a matrix. Else Hutchinson's
            estimate, the mean of `<z, B^i z>` over as many vectors z of random signs: k products for each, right on average.
        generator: of the signs.
    """
    if probes is not None and probes < 1:
        raise ValueError(f"probes={probes}: must be at least 1, or None for exact traces")
    product = as_product(B)
    sums = torch.zeros(k, dtype=torch.float64, device=like.device)
    for index in range(like.numel() if probes is None else probes):
        if probes is None:
            z = torch.zeros_like(like)
            z.view(-1)[index] = 1
        else:
            z = torch.randint(0, 2, like.shape, generator=generator).to(like) * 2 - 1
        # <B^a z, B^b z> is <z, B^(a+b) z>: half of the products do
        powers = [z]
        for i in range(1, k + 1):
            if (i + 1) // 2 == len(powers):
                powers.append(product(powers[-1]))
            sums[i - 1] += (powers[i // 2].double() * powers[(i + 1) // 2].double()).sum()
    return sums if probes is None else sums / probes


class Preconditioner:
    """`P_tau` of a symmetric, positive semi-definite B, scaled so that the largest eigenvalue of `B P_tau` is 1, or nearly.

        P_0 v = v,    P_k v = e_k v - B P_{k-1} v,    k = 1 ... tau        (Horner's scheme: tau products)

    Args:
        B: (n, n), or its product with vectors like `like`.
        tau: degree, 0 to n - 1. Beyond 10 the polynomials of floating-point numbers are no longer those of the numbers.
        like: shape of x; needed if B is a function.
        probes, generator: for the traces, see `power_sums`.
        sums: the traces themselves, if they are known, tau of them.

    B is divided by its trace first, so that no power of it overflows. The scale is found by power iteration; estimated traces
    may make P indefinite, which is refused.

    Raises:
        ValueError: tau out of range, a B that is no matrix and no function, or P not positive.
    """

    def __init__(
        self,
        B: Matrix,
        tau: int,
        *,
        like: Tensor | None = None,
        probes: int | None = None,
        generator: torch.Generator | None = None,
        sums: Tensor | None = None,
    ) -> None:
        if like is None:
            if not isinstance(B, Tensor) or B.ndim != 2 or B.shape[0] != B.shape[1]:
                raise ValueError("B: must be a square matrix, or a function with like=x beside it")
            like = B[0]
        if not 0 <= tau < like.numel():
            raise ValueError(f"tau={tau}: must lie in 0 .. {like.numel() - 1}")
        self.tau, self.like, self.product = tau, like, as_product(B)
        sums = power_sums(B, like, tau, probes, generator) if sums is None else sums.double()
        if len(sums) != tau:
            raise ValueError(f"sums: {tau} traces are needed, got {len(sums)}")
        self.trace = float(sums[0]) if tau else 1.0
        powers = self.trace ** torch.arange(1, tau + 1, dtype=torch.float64, device=sums.device)
        self.e = elementary(sums / powers).tolist() if tau else [1.0]
        self.scale = 1.0
        self.scale = 1 / largest(lambda v: self.product(self(v)), like)

    def __call__(self, v: Tensor) -> Tensor:
        """`P v`."""
        found = v
        for e in self.e[1:]:
            found = e * v - self.product(found) / self.trace
        return found * self.scale


def largest(product: Callable[[Tensor], Tensor], like: Tensor, steps: int = 200, tol: float = 1e-6) -> float:
    """The largest eigenvalue of a matrix with eigenvalues >= 0, from below, by power iteration."""
    v = torch.randn(like.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(like)
    value = last = 0.0
    for _ in range(steps):
        v = v / torch.linalg.vector_norm(v)
        w = product(v)
        value = float((v * w).sum())
        if not value > 0 or abs(value - last) <= tol * value:
            break
        v, last = w, value
    if not 0 < value < math.inf:
        raise ValueError(f"B: it, or its polynomial, has no positive eigenvalue; found {value:.3g}")
    return value


__all__ = ["Form", "Matrix", "Preconditioner", "as_product", "elementary", "largest", "polynomial", "power_sums"]
