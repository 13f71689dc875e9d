"""Subspaces that a gradient is projected onto: chosen once, kept for a while, applied in two directions.

A projector makes a basis from a matrix, or from random numbers alone; the basis is the state that is kept. `project` gives the
small matrix, `back` the matrix of full size that it stands for, and `back(project(G))` is the orthogonal projection of G for
every projector but "gaussian", for which it is G in the mean.

| name       | basis                                                | small matrix of an m x n one     |
|------------|------------------------------------------------------|----------------------------------|
| `svd`      | leading singular vectors of a side, as rows (r x side) | r x n (left) or m x r (right)  |
| `random`   | random orthonormal rows (r x side)                   | the same                         |
| `gaussian` | independent normal entries of variance 1 / r         | the same                         |
| `rows`     | r places of rows (int64)                             | r x n                            |
| `columns`  | r places of columns (int64)                          | m x r                            |
| `entries`  | k places in the flattened matrix (int64)             | k                                |

Random choices are functions of uniform numbers that the caller gives, so that whoever draws them by seed, name and step gets
the same subspace on every rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Kind = Literal["svd", "random", "gaussian", "rows", "columns", "entries"]
Side = Literal["short", "long", "left", "right"]


@dataclass(frozen=True)
class Projector:
    """One way to choose a subspace of matrices (..., m, n), each of a batch by itself.

    Args:
        kind: see the table of the module.
        rank: how many vectors, rows, columns or entries: a number, or a share in (0, 1] of what there is, at least one.
        side: which side of the matrix "svd", "random" and "gaussian" make shorter: "left" rows, "right" columns; "short" the
            shorter of the two, with m >= n the columns; "long" the other one.

    Raises:
        ValueError: for anything else.
    """

    kind: Kind = "svd"
    rank: int | float = 0.25
    side: Side = "short"

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind={self.kind!r}: must be one of {', '.join(get_args(Kind))}")
        if self.side not in get_args(Side):
            raise ValueError(f"side={self.side!r}: must be one of {', '.join(get_args(Side))}")
        whole = isinstance(self.rank, int) and not isinstance(self.rank, bool) and self.rank >= 1
        share = isinstance(self.rank, float) and 0.0 < self.rank <= 1.0
        if not whole and not share:
            raise ValueError(f"rank={self.rank!r}: must be a whole number from 1, or a share in (0, 1]")

    def left(self, m: int, n: int) -> bool:
        """Whether it is the rows that become fewer."""
        if self.kind in ("rows", "columns"):
            return self.kind == "rows"
        return {"left": True, "right": False, "short": m < n, "long": m >= n}[self.side]

    def size(self, m: int, n: int) -> int:
        """r, or k: how many there are."""
        whole = m * n if self.kind == "entries" else m if self.left(m, n) else n
        asked = self.rank if isinstance(self.rank, int) else round(self.rank * whole)
        most = min(m, n) if self.kind == "svd" else whole
        return max(1, min(asked, most))

    def basis_shape(self, m: int, n: int) -> tuple[int, ...]:
        """Shape of the basis of one m x n matrix."""
        if self.kind in ("rows", "columns", "entries"):
            return (self.size(m, n),)
        return self.size(m, n), m if self.left(m, n) else n

    def small_shape(self, m: int, n: int) -> tuple[int, ...]:
        """Shape of what one m x n matrix is projected to."""
        r = self.size(m, n)
        if self.kind == "entries":
            return (r,)
        return (r, n) if self.left(m, n) else (m, r)

    def draws(self, m: int, n: int) -> int:
        """How many uniform numbers a basis for an m x n matrix is drawn from."""
        if self.kind in ("rows", "columns", "entries"):
            return {"rows": m, "columns": n, "entries": m * n}[self.kind]
        return 0 if self.kind == "svd" else math.prod(self.basis_shape(m, n))

    def basis(self, G: Tensor, uniform: Tensor | None = None) -> Tensor:
        """A basis for G, shape (..., *basis_shape); places are int64, vectors have the dtype of G.

        Args:
            G: (..., m, n). Only "svd" looks at its entries; nan and infinity give a basis of nan.
            uniform: numbers in [0, 1), (..., at least `draws(m, n)`), of which the first are used; not for "svd".
        """
        m, n = G.shape[-2:]
        r, count = self.size(m, n), self.draws(m, n)
        if self.kind == "svd":
            return _leading(G, r, self.left(m, n))
        if uniform is None or uniform.shape[-1] < count:
            raise ValueError(f"Projector({self.kind!r}).basis: is drawn from {count} numbers for each matrix of {m} x {n}")
        uniform = uniform[..., :count]
        if self.kind in ("rows", "columns", "entries"):
            return uniform.argsort(dim=-1, stable=True)[..., :r].sort(dim=-1).values
        normal = _normal(uniform, G.dtype).unflatten(-1, (r, count // r))
        return normal / math.sqrt(r) if self.kind == "gaussian" else _orthonormal_rows(normal)

    def project(self, G: Tensor, basis: Tensor) -> Tensor:
        """The small matrix: `B G`, `G B^T`, or the chosen rows, columns or entries."""
        m, n = G.shape[-2:]
        if self.kind == "entries":
            return G.flatten(-2).gather(-1, basis)
        if self.kind == "rows":
            return G.gather(-2, basis[..., :, None].expand(*basis.shape, n))
        if self.kind == "columns":
            return G.gather(-1, basis[..., None, :].expand(*basis.shape[:-1], m, basis.shape[-1]))
        return basis.to(G.dtype) @ G if self.left(m, n) else G @ basis.to(G.dtype).mT

    def back(self, small: Tensor, basis: Tensor, m: int, n: int) -> Tensor:
        """The m x n matrix that a small one stands for: `B^T small`, `small B`, or zeros where nothing was chosen."""
        if self.kind == "entries":
            flat = small.new_zeros(*small.shape[:-1], m * n)
            return flat.scatter(-1, basis, small).unflatten(-1, (m, n))
        if self.kind == "rows":
            zeros = small.new_zeros(*small.shape[:-2], m, n)
            return zeros.scatter(-2, basis[..., :, None].expand(*basis.shape, n), small)
        if self.kind == "columns":
            zeros = small.new_zeros(*small.shape[:-2], m, n)
            return zeros.scatter(-1, basis[..., None, :].expand(*basis.shape[:-1], m, basis.shape[-1]), small)
        return basis.to(small.dtype).mT @ small if self.left(m, n) else small @ basis.to(small.dtype)

    def carry(self, small: Tensor, old: Tensor, new: Tensor, m: int, n: int, *, squared: bool = False) -> Tensor:
        """State of one subspace in another: what `project(back(...))` makes of it, and of `squared` state its second moments.

        `T = B_new B_old^T` takes m to `T m`, and a second moment to that of independent entries, `T^2 v` entry by entry. Places
        that are in both keep their state, others begin at zero.
        """
        if self.kind in ("rows", "columns", "entries"):
            return self.project(self.back(small, old, m, n), new)
        T = new.to(small.dtype) @ old.to(small.dtype).mT
        T = T.square() if squared else T
        return T @ small if self.left(m, n) else small @ T.mT


def _leading(G: Tensor, r: int, left: bool) -> Tensor:
    """r leading singular vectors of one side, as rows."""
    finite = G.isfinite().all(-1).all(-1)[..., None, None]
    U, _, Vh = torch.linalg.svd(torch.where(finite, G, 0.0), full_matrices=False)
    chosen = U[..., :, :r].mT if left else Vh[..., :r, :]
    return torch.where(finite, chosen, torch.nan)


def _normal(uniform: Tensor, dtype: torch.dtype) -> Tensor:
    """Normal numbers from uniform ones."""
    symmetric = (2 * uniform.double() - 1).clamp(min=-1 + 2**-53)  # a uniform number may be 0, none is 1
    return (math.sqrt(2.0) * torch.erfinv(symmetric)).to(dtype)


def _orthonormal_rows(normal: Tensor) -> Tensor:
    """Uniformly distributed over all sets of orthonormal rows: QR, with the signs of R's diagonal taken out."""
    Q, R = torch.linalg.qr(normal.mT)
    return (Q * R.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]).mT


__all__ = ["Kind", "Projector", "Side"]
