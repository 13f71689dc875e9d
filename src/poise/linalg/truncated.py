"""Leading singular triplets of a matrix: exact, or of what a random sketch finds of it."""

from __future__ import annotations

import torch
from torch import Tensor


def singular_triplets(M: Tensor, sketch: Tensor | None = None, iterations: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """U, s, V^T with `M = U diag(s) V^T`; with a sketch, of as many columns, nearly and for the leading ones.

        Q = orthonormal columns of (M M^T)^iterations M sketch;   U' diag(s) V^T = Q^T M;   U = Q U'

    Args:
        M: (..., m, n).
        sketch: (..., n, columns), normal numbers; some more columns than triplets are wanted, for the last of them are the
            least certain. None: the exact decomposition.
        iterations: of subspace iteration; what singular values barely differ, as of a matrix of signs, is told apart by many.

    Source: "Finding structure with randomness: Probabilistic algorithms for constructing approximate matrix decompositions"
    (arXiv 0909.4061).
    """
    if sketch is None:
        return torch.linalg.svd(M, full_matrices=False)
    Q = torch.linalg.qr(M @ sketch)[0]
    for _ in range(iterations):
        Q = torch.linalg.qr(M @ torch.linalg.qr(M.mT @ Q)[0])[0]
    U, s, Vh = torch.linalg.svd(Q.mT @ M, full_matrices=False)
    return Q @ U, s, Vh


__all__ = ["singular_triplets"]
