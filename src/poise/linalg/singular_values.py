"""Singular values of large matrices: all of them, or the largest, by what a matrix's size allows.

| function  | gives           | relative accuracy of s_i       | cost of (m, n), k = min(m, n), float64                      |
|-----------|-----------------|--------------------------------|-------------------------------------------------------------|
| `exact`   | all k           | 2e-16 * s_1 / s_i              | some 3 m n k operations, one copy of the matrix             |
| `gram`    | all k           | 2e-16 * (s_1 / s_i)^2          | m n k + 2 k^3 operations that run as products, k^2 numbers  |
| `lanczos` | the largest few | of s_1 1e-6 or better         | 4 m n operations a step, `steps` vectors of both lengths    |

The square in the second row is what forming `M M^T` costs: singular values below 1e-8 s_1 drown.
"""

from __future__ import annotations

import torch
from torch import Tensor


def exact(M: Tensor) -> Tensor:
    """All singular values in descending order, in float64 from LAPACK. M: (m, n), finite."""
    return torch.linalg.svdvals(M.double())


def gram(M: Tensor, block: int = 1024) -> Tensor:
    """All singular values in descending order, as square roots of the eigenvalues of the smaller Gram matrix, in float64.

    Args:
        M: (m, n), finite, any floating dtype; widened `block` columns at a time.
    """
    wide = M if M.shape[0] <= M.shape[1] else M.T
    G = torch.zeros(wide.shape[0], wide.shape[0], dtype=torch.float64)
    for start in range(0, wide.shape[1], block):
        some = wide[:, start : start + block].double()
        G.addmm_(some, some.T)
    return torch.linalg.eigvalsh(G).flip(0).clamp_min(0).sqrt()


def lanczos(M: Tensor, count: int, *, steps: int | None = None, tolerance: float = 1e-4, seed: int = 0) -> Tensor:
    """The `count` largest singular values, descending, by Golub-Kahan bidiagonalisation from a random start.

        beta_j u_j = M v_j - alpha_{j-1} u_{j-1},     alpha_j v_{j+1} = M^T u_j - beta_j v_j

    with every vector orthogonalised against all before it; singular values of the bidiagonal matrix are the answer. Each is a
    lower bound. Ends when none of them moves by more than `tolerance` of the largest in four steps, which leaves the largest
    far closer than that, or after `steps`, by default `10 * count + 24`; on a matrix smaller than that it is exact.

    Args:
        M: (m, n), finite; products are in float32, or float64 if M is.

    Source: "Calculating the Singular Values and Pseudo-Inverse of a Matrix" (Golub and Kahan, 1965).
    """
    M = M.to(torch.promote_types(M.dtype, torch.float32))
    most = min(steps or 10 * count + 24, *M.shape)
    generator = torch.Generator().manual_seed(seed)
    V = torch.zeros(most + 1, M.shape[1], dtype=M.dtype)
    U = torch.zeros(most, M.shape[0], dtype=M.dtype)
    V[0] = torch.nn.functional.normalize(torch.randn(M.shape[1], generator=generator, dtype=M.dtype), dim=0)
    B = torch.zeros(most, most + 1, dtype=torch.float64)
    before = torch.zeros(count, dtype=torch.float64)
    for j in range(most):
        for of, product, index, entry in ((U, M @ V[j], j, (j, j)), (V, None, j + 1, (j, j + 1))):
            w = M.T @ U[j] if product is None else product
            for _ in range(2):  # twice is enough (Kahan, Parlett)
                w = w - of[:index].T @ (of[:index] @ w)
            length = float(torch.linalg.vector_norm(w))
            B[entry] = length
            if length > 0:
                of[index] = w / length
        ended = B[j, j + 1] <= 1e-12 * B[0, 0]
        if j % 4 == 3 or ended:
            found = torch.linalg.svdvals(B[: j + 1, : j + 2])[:count]
            settled = len(found) == count == len(before) and bool((found - before).max() <= tolerance * found[0])
            if settled or ended:
                return found
            before = found
    return torch.linalg.svdvals(B)[:count]


__all__ = ["exact", "gram", "lanczos"]
