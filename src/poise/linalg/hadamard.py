"""Normalised Hadamard matrices and their fast transform.

A Hadamard matrix has entries +1 and -1 and orthogonal rows; divided by sqrt(n) it is a rotation that spreads every coordinate
evenly over all others. Of size n = K 2^a it is here

    H_n = H_K (x) H_{2^a} / sqrt(n),    H_1 = [1],  H_{2m} = [[H_m, H_m], [H_m, -H_m]]

with K = 1 or an order that the quadratic residues of a prime give:

    Paley's first,  K = q + 1,     q = 3 mod 4:    I + S,   S = [[0, 1], [-1, Q]]          12, 20, 24, 44, 60, 68, 72, ...
    Paley's second, K = 2 (q + 1), q = 1 mod 4:    C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]],
                                                    C = [[0, 1], [1, Q]]                   28, 36, 76, 108, 124, 148, ...

where Q_ij = 1 if i - j is a square modulo q, -1 if it is not, 0 if it is zero. Source: R. E. A. C. Paley, "On Orthogonal
Matrices" (1933).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from .lengths import wide

LARGEST = 256  # of the orders K, whose product is a dense one
BLOCK = 16  # the powers of two are taken so many at a time


def hadamard(x: Tensor, dim: int = -1, *, inverse: bool = False) -> Tensor:
    """`H x` along a dimension, or `H^T x`, which undoes it: `K + 16 log16(n / K)` additions an entry.

    Computed in float32, or float64 for float64, and returned in the dtype of `x`.

    Args:
        x: any shape.
        dim: along which its size must be supported; see `supported`.
        inverse: the other direction. For powers of two both are the same, since H is symmetric.

    Raises:
        ValueError: no Hadamard matrix of this size is known here.
    """
    n = x.shape[dim]
    K = _order(n)
    if K is None:
        raise ValueError(
            f"x has {n} entries along dim {dim}: no Hadamard matrix of this size is known here, the next size is {padded(n)}"
        )
    y = wide(x).movedim(dim, -1)
    shape, inner = y.shape, n
    for factor in _factors(n, K):
        signs = factor.to(y)
        signs = signs.mT if inverse else signs
        inner //= len(signs)  # entries that stand between two that are added up
        y = signs @ y.reshape(-1, len(signs), inner) if inner > 1 else y.reshape(-1, len(signs)) @ signs.mT
    return (y.reshape(shape) / math.sqrt(n)).movedim(-1, dim).to(x.dtype)


def hadamard_matrix(n: int) -> Tensor:
    """The matrix H itself, (n, n), float64."""
    return hadamard(torch.eye(n, dtype=torch.float64), 0)


def supported(n: int) -> bool:
    """Whether there is a transform of size n: a power of two, or such a one times an order K of at most 256."""
    return _order(n) is not None


def padded(n: int) -> int:
    """The least supported size that is not below n."""
    while not supported(n):
        n += 1
    return n


@lru_cache(maxsize=4096)
def _order(n: int) -> int | None:
    """The least K of which n is a product with a power of two; None: there is none."""
    if n < 1:
        return None
    odd = n
    while odd % 2 == 0:
        odd //= 2
    if odd == 1:
        return 1
    K = odd * 4
    while min(n, LARGEST) >= K:
        if n % K == 0 and _prime_of(K) is not None:
            return K
        K *= 2
    return None


def _prime_of(K: int) -> tuple[int, bool] | None:
    """The prime q that gives order K, and whether by Paley's first construction."""
    if _is_prime(K - 1):  # K is a multiple of 4, so that q is 3 mod 4
        return K - 1, True
    q = K // 2 - 1
    return (q, False) if q % 4 == 1 and _is_prime(q) else None


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, math.isqrt(q) + 1))


@lru_cache(maxsize=64)
def _factors(n: int, K: int) -> list[Tensor]:
    """Matrices of signs whose Kronecker product, in this order, is H_n: small dense products are faster than additions."""
    found, rest = [] if K == 1 else [_paley(K)], n // K
    while rest > 1:
        size = min(rest, BLOCK)
        sylvester = torch.ones(1, 1)
        while len(sylvester) < size:
            sylvester = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), sylvester)
        found.append(sylvester)
        rest //= size
    return found


@lru_cache(maxsize=64)
def _paley(K: int) -> Tensor:
    """The matrix of signs of order K."""
    found = _prime_of(K)
    assert found is not None
    q, first = found
    places = torch.arange(q)
    symbols = torch.full((q,), -1.0)
    symbols[places * places % q] = 1.0
    symbols[0] = 0.0
    core = torch.zeros(q + 1, q + 1)
    core[0, 1:] = 1.0
    core[1:, 0] = -1.0 if first else 1.0
    core[1:, 1:] = symbols[(places[:, None] - places) % q]
    if first:
        return core + torch.eye(q + 1)
    return torch.kron(core, torch.tensor([[1.0, 1.0], [1.0, -1.0]])) + torch.kron(
        torch.eye(q + 1), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    )


__all__ = ["hadamard", "hadamard_matrix", "padded", "supported"]
