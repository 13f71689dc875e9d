"""Subspaces that a gradient is projected onto: chosen once, kept for a while, applied in two directions.

A projector makes a basis from a matrix, or from random numbers alone; the basis is the state that is kept. `project` gives the
small matrix, `back` the matrix of full size that it stands for, and `back(project(G))` is the orthogonal projection of G for
every projector but "gaussian", for which it is G in the mean.

| name         | basis                                                  | small matrix of an m x n one   |
|--------------|--------------------------------------------------------|--------------------------------|
| `svd`        | leading singular vectors of a side, as rows (r x side) | r x n (left) or m x r (right)  |
| `randomized` | nearly the same, from a random sketch of the matrix    | the same                       |
| `random`     | random orthonormal rows (r x side)                     | the same                       |
| `gaussian`   | independent normal entries of variance 1 / r           | the same                       |
| `permuted`   | r places of a side (int64)                             | the same                       |
| `rows`       | r places of rows (int64)                               | r x n                          |
| `columns`    | r places of columns (int64)                            | m x r                          |
| `entries`    | k places in the flattened matrix (int64)               | k                              |

With side "both", vectors of the left and of the right side stand beside each other, (r x (m + n)), and the small matrix is
r x r.

Random choices are functions of uniform numbers that the caller gives, so that whoever draws them by seed, name and step gets
the same subspace on every rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .truncated import singular_triplets

Kind = Literal["svd", "randomized", "random", "gaussian", "permuted", "rows", "columns", "entries"]
Side = Literal["short", "long", "left", "right", "both"]

PLACES = ("permuted", "rows", "columns", "entries")  # bases that are places, not vectors
SPARE = 8  # rows of a sketch beyond those that are kept: with two power steps, what a range finder is usually given


@dataclass(frozen=True)
class Projector:
    """One way to choose a subspace of matrices (..., m, n), each of a batch by itself.

    Args:
        kind: see the table of the module.
        rank: how many vectors, rows, columns or entries: a number, or a share in (0, 1] of what there is, at least one. A share
            of vectors is rounded; a share of rows, columns or entries is rounded down, so that it is never exceeded.
        side: which side of the matrix "svd", "randomized", "random", "gaussian" and "permuted" make shorter: "left" rows,
            "right" columns; "short" the shorter of the two, with m >= n the columns; "long" the other one; "both" is for
            vectors only.

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
        if self.side == "both" and self.kind in PLACES:
            raise ValueError(f"side='both': is for projectors onto vectors, kind={self.kind!r} chooses places")
        whole = isinstance(self.rank, int) and not isinstance(self.rank, bool) and self.rank >= 1
        share = isinstance(self.rank, float) and 0.0 < self.rank <= 1.0
        if not whole and not share:
            raise ValueError(f"rank={self.rank!r}: must be a whole number from 1, or a share in (0, 1]")

    @property
    def looks(self) -> bool:
        """Whether the basis depends on the matrix."""
        return self.kind in ("svd", "randomized")

    @property
    def both(self) -> bool:
        return self.side == "both"

    def left(self, m: int, n: int) -> bool:
        """Whether it is the rows that become fewer (of "both": also)."""
        if self.kind in ("rows", "columns"):
            return self.kind == "rows"
        return {"left": True, "right": False, "short": m < n, "long": m >= n, "both": True}[self.side]

    def size(self, m: int, n: int) -> int:
        """r, or k: how many there are."""
        if self.kind == "entries":
            whole = m * n
        else:
            whole = min(m, n) if self.both else m if self.left(m, n) else n
        down = self.kind in ("rows", "columns", "entries")
        asked = self.rank if isinstance(self.rank, int) else (math.floor if down else round)(self.rank * whole)
        most = min(m, n) if self.looks else whole
        return max(1, min(asked, most))

    def basis_shape(self, m: int, n: int) -> tuple[int, ...]:
        """Shape of the basis of one m x n matrix."""
        if self.kind in PLACES:
            return (self.size(m, n),)
        return self.size(m, n), m + n if self.both else m if self.left(m, n) else n

    def small_shape(self, m: int, n: int) -> tuple[int, ...]:
        """Shape of what one m x n matrix is projected to."""
        r = self.size(m, n)
        if self.kind == "entries":
            return (r,)
        if self.both:
            return r, r
        return (r, n) if self.left(m, n) else (m, r)

    def draws(self, m: int, n: int) -> int:
        """How many uniform numbers a basis for an m x n matrix is drawn from."""
        if self.kind == "svd":
            return 0
        if self.kind == "entries":
            return m * n
        if self.kind in PLACES:
            return m if self.left(m, n) else n
        if self.kind == "randomized":
            return (n if self.left(m, n) else m) * self._sketch(m, n)
        return math.prod(self.basis_shape(m, n))

    def basis(self, G: Tensor, uniform: Tensor | None = None) -> Tensor:
        """A basis for G, shape (..., *basis_shape); places are int64, vectors have the dtype of G.

        Args:
            G: (..., m, n). Only "svd" and "randomized" look at its entries; nan and infinity give a basis of nan.
            uniform: numbers in [0, 1), (..., at least `draws(m, n)`), of which the first are used; not for "svd".
        """
        m, n = G.shape[-2:]
        r, count = self.size(m, n), self.draws(m, n)
        if self.kind == "svd":
            return self._leading(G, r)
        if uniform is None or uniform.shape[-1] < count:
            raise ValueError(f"Projector({self.kind!r}).basis: is drawn from {count} numbers for each matrix of {m} x {n}")
        uniform = uniform[..., :count]
        if self.kind in PLACES:
            return uniform.argsort(dim=-1, stable=True)[..., :r].sort(dim=-1).values
        normal = _normal(uniform, G.dtype)
        if self.kind == "randomized":
            return self._leading(G, r, normal.unflatten(-1, (-1, self._sketch(m, n))))
        normal = normal.unflatten(-1, (r, count // r))
        if self.kind == "gaussian":
            return normal / math.sqrt(r)
        return torch.cat([_orthonormal_rows(part) for part in normal.split(self._sides(m, n), -1)], -1)

    def project(self, G: Tensor, basis: Tensor) -> Tensor:
        """The small matrix: `B G`, `G B^T`, `A G B^T`, or the chosen rows, columns or entries."""
        m, n = G.shape[-2:]
        if self.kind == "entries":
            return G.flatten(-2).gather(-1, basis.expand(*G.shape[:-2], -1))
        if self.kind in PLACES:
            return G.gather(-2 if self.left(m, n) else -1, self._spread(basis, G.shape))
        basis = basis.to(G.dtype)
        if self.both:
            A, B = basis.split([m, n], -1)
            return A @ G @ B.mT
        return basis @ G if self.left(m, n) else G @ basis.mT

    def back(self, small: Tensor, basis: Tensor, m: int, n: int) -> Tensor:
        """The m x n matrix that a small one stands for: `B^T small`, `small B`, `A^T small B`, or zeros where nothing is."""
        if self.kind == "entries":
            flat = small.new_zeros(*small.shape[:-1], m * n)
            return flat.scatter(-1, basis.expand(*small.shape[:-1], -1), small).unflatten(-1, (m, n))
        if self.kind in PLACES:
            zeros = small.new_zeros(*small.shape[:-2], m, n)
            return zeros.scatter(-2 if self.left(m, n) else -1, self._spread(basis, zeros.shape), small)
        basis = basis.to(small.dtype)
        if self.both:
            A, B = basis.split([m, n], -1)
            return A.mT @ small @ B
        return basis.mT @ small if self.left(m, n) else small @ basis

    def carry(self, small: Tensor, old: Tensor, new: Tensor, m: int, n: int, *, squared: bool = False) -> Tensor:
        """State of one subspace in another: what `project(back(...))` makes of it, and of `squared` state its second moments.

        `T = B_new B_old^T` takes m to `T m`, and a second moment to that of independent entries, `T^2 v` entry by entry. Places
        that are in both keep their state, others begin at zero.
        """
        if self.kind in PLACES:
            return self.project(self.back(small, old, m, n), new)
        sides = self._sides(m, n)
        maps = [
            b.to(small.dtype) @ a.to(small.dtype).mT for a, b in zip(old.split(sides, -1), new.split(sides, -1), strict=True)
        ]
        maps = [T.square() for T in maps] if squared else maps
        if self.both:
            return maps[0] @ small @ maps[1].mT
        return maps[0] @ small if self.left(m, n) else small @ maps[0].mT

    def aligned(self, new: Tensor, old: Tensor, m: int, n: int) -> Tensor:
        """`new` with every singular vector turned to the side on which its predecessor in `old` is: their signs are arbitrary.

        Other bases are returned as they are.
        """
        if not self.looks:
            return new
        sides = self._sides(m, n)
        dots = [(a * b).sum(-1, keepdim=True) for a, b in zip(old.split(sides, -1), new.split(sides, -1), strict=True)]
        turned = [torch.where(dot < 0, -part, part) for dot, part in zip(dots, new.split(sides, -1), strict=True)]
        return torch.cat(turned, -1)

    def _sides(self, m: int, n: int) -> list[int]:
        """How the columns of a basis of vectors fall into those of the left and of the right side."""
        return [m, n] if self.both else [m if self.left(m, n) else n]

    def _sketch(self, m: int, n: int) -> int:
        return min(self.size(m, n) + SPARE, m, n)

    def _spread(self, places: Tensor, shape: torch.Size) -> Tensor:
        """Places of rows or columns for every entry of them in matrices of this shape."""
        *batch, m, n = shape
        if self.left(m, n):
            return places[..., :, None].expand(*batch, -1, n)
        return places[..., None, :].expand(*batch, m, -1)

    def _leading(self, G: Tensor, r: int, sketch: Tensor | None = None) -> Tensor:
        """r leading singular vectors as rows; with a `sketch` (the other side x columns), of what it finds of G."""
        finite = G.isfinite().all(-1).all(-1)[..., None, None]
        A = torch.where(finite, G, 0.0)
        left = self.left(*G.shape[-2:])
        if left or sketch is None:
            U, _, Vh = singular_triplets(A, sketch)
        else:
            V, _, Uh = singular_triplets(A.mT, sketch)
            U, Vh = Uh.mT, V.mT
        parts = [U[..., :, :r].mT] if left else []
        parts += [Vh[..., :r, :]] if self.both or not left else []
        return torch.where(finite, torch.cat(parts, -1), torch.nan)


def _normal(uniform: Tensor, dtype: torch.dtype) -> Tensor:
    """Normal numbers from uniform ones."""
    symmetric = (2 * uniform.double() - 1).clamp(min=-1 + 2**-53)  # a uniform number may be 0, none is 1
    return (math.sqrt(2.0) * torch.erfinv(symmetric)).to(dtype)


def _orthonormal_rows(normal: Tensor) -> Tensor:
    """Uniformly distributed over all sets of orthonormal rows: QR, with the signs of R's diagonal taken out."""
    Q, R = torch.linalg.qr(normal.mT)
    return (Q * R.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]).mT


__all__ = ["PLACES", "Kind", "Projector", "Side"]
