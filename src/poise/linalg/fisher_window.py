"""The inverse of a damped empirical Fisher matrix of m gradients, applied and looked into without forming it.

    F = lam I + 1/m sum_i g_i g_i^T

Adding the gradients one at a time, each by the Sherman-Morrison formula, gives vectors v_i and numbers d_i with

    v_i = F_{i-1}^(-1) g_i = g_i / lam - sum_{j<i} v_j (v_j . g_i) / d_j,        d_i = m + g_i . v_i
    F^(-1) x = x / lam - sum_i v_i (v_i . x) / d_i,        diag F^(-1) = 1 / lam - sum_i v_i^2 / d_i

which is O(m^2 d) once and O(m d) for a product or the diagonal, with memory for m vectors. For the products alone, and for a
window that moves by one gradient at a time, `poise.linalg.woodbury` needs no v_i.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


class FisherWindow:
    """`F^(-1)` for the gradients G, whole or in diagonal blocks.

    Args:
        G: (m, d), one gradient a row. It is read once and not kept.
        lam: damping, positive. What is below `eps |g|^2 / m` is lost to rounding.
        block: coordinates of a block, the last may be shorter: F is then block-diagonal. None keeps it whole.

    Raises:
        ValueError: G is not a matrix with entries, or lam or block not positive.

    Source: "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information" (arXiv 2107.03356), its static algorithm.
    """

    def __init__(self, G: Tensor, lam: float = 1e-5, block: int | None = None) -> None:
        if G.ndim != 2 or 0 in G.shape:
            raise ValueError(f"G: must be (gradients, coordinates), at least one of each, got {tuple(G.shape)}")
        if not lam > 0:
            raise ValueError(f"lam={lam}: must be positive")
        if block is not None and block < 1:
            raise ValueError(f"block={block}: must be positive, or None")
        self.m, self.d = G.shape
        self.lam, self.block = lam, max(min(block or self.d, self.d), 1)
        self.V = self._blocks(G)  # (blocks, m, block): g_i until it becomes v_i
        self.den = G.new_empty(len(self.V), self.m)
        for i in range(self.m):
            g = self.V[:, i].clone()
            before = self.V[:, :i]
            weights = torch.einsum("bjc,bc->bj", before, g) / self.den[:, :i]
            v = g / lam - torch.einsum("bj,bjc->bc", weights, before)
            self.V[:, i] = v
            self.den[:, i] = self.m + (g * v).sum(-1)

    def solve(self, x: Tensor) -> Tensor:
        """`F^(-1) x`, for x of shape (d,) or several at once, (n, d)."""
        if x.ndim not in (1, 2) or x.shape[-1] != self.d:
            raise ValueError(f"x: must be (..., {self.d}) with at most one dimension more, got {tuple(x.shape)}")
        cut = self._blocks(x.reshape(-1, self.d))
        weights = torch.einsum("bmc,bnc->bnm", self.V, cut) / self.den[:, None]
        return self._whole(cut / self.lam - weights @ self.V).reshape(x.shape)

    def diagonal(self) -> Tensor:
        """The diagonal of `F^(-1)`, (d,)."""
        taken = torch.einsum("bmc,bm->bc", self.V.square(), 1 / self.den)
        return self._whole((1 / self.lam - taken)[:, None])[0]

    def _blocks(self, rows: Tensor) -> Tensor:
        """(n, d) as a new (blocks, n, block); the last block is filled up with zeros, which stay zeros."""
        filled = pad(rows, (0, -self.d % self.block))
        return filled.unflatten(-1, (-1, self.block)).transpose(0, 1).clone(memory_format=torch.contiguous_format)

    def _whole(self, cut: Tensor) -> Tensor:
        """The inverse of `_blocks`."""
        return cut.transpose(0, 1).flatten(1)[:, : self.d]


__all__ = ["FisherWindow"]
