"""Shampoo's preconditioner: inverse roots of the second moments of a gradient's rows and columns, block by block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from poise.linalg.block_grid import BlockGrid, square
from poise.linalg.roots import Damping, check_damping, coupled_newton, inverse_root

from ..transform import Context, Param, Slot, State, Transform
from .adaptive import check_eps
from .grafting import Grafting, with_norm_of

Root = Literal["eigh", "newton"]

RIDGE = 1e-6  # of Newton's iteration in float32, relative to the largest eigenvalue


class kronecker(Transform):
    r"""An average of gradients between inverse roots of the gradients' row and column moments.

    For each block of each matrix (rows = outputs; a convolution as (out, in * kernel), each of stacked experts on its own):

        L <- b2 L + w G G^T;   R <- b2 R + w G^T G                w = 1 - b2, or 1 where b2 = 1
        m <- b1 m + (1 - b1) G;   M = m / (1 - b1^t)
        u  = (L / (1 - b2^t))^(-e) M (R / (1 - b2^t))^(-e)        without correction where b2 = 1

    with e = 1/4. The roots are those of step `start`, then of each step that `frequency` divides, the newest gradient included;
    before `start`, u is the grafted rule's own step. From then on u is given its length, block by block. A side of length 1 has
    no moments, and what is left is a vector, with e = 1/2. A root that cannot be found leaves the old one in its place.

    Args:
        betas: (b1, b2), b1 in [0, 1), b2 in (0, 1].
        eps, damping: see `poise.linalg.roots.inverse_root`.
        frequency: steps between new roots. start: None: frequency.
        max_dim: the longest side of a block.
        exponent: e of matrices; None: 1/4.
        grafting: whose length the update takes.
        root: "newton" finds roots by products alone; with eps, and in float32 at least 1e-6 of the largest eigenvalue, added.
        correct_bias: without it, M = m and neither L nor R are divided.
        merge: a matrix with at most max_dim entries becomes one vector.

    State: `exp_avg`, 1 value per element; `L`, `R`, `L_root` and `R_root`, never encoded, each the side of a block per element;
    v if the grafting has one.
    """

    unit = "matrix"

    def __init__(
        self,
        betas: tuple[float, float] = (0.9, 1.0),
        eps: float = 1e-12,
        frequency: int = 1,
        start: int | None = None,
        max_dim: int = 1024,
        exponent: float | None = None,
        grafting: Grafting | None = None,
        damping: Damping = "floor",
        root: Root = "eigh",
        correct_bias: bool = True,
        merge: bool = False,
    ) -> None:
        if len(betas) != 2 or not 0.0 <= betas[0] < 1.0 or not 0.0 < betas[1] <= 1.0:
            raise ValueError(f"betas={betas}: the first must be in [0, 1), the second in (0, 1]")
        check_eps(eps)
        check_damping(eps, damping)
        for name, value in (
            ("precondition_frequency", frequency),
            ("start_preconditioning_step", start),
            ("max_preconditioner_dim", max_dim),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if exponent is not None and not exponent > 0:
            raise ValueError(f"exponent={exponent}: must be positive, or None")
        if root not in get_args(Root):
            raise ValueError(f"root={root!r}: must be 'eigh' or 'newton'")
        if root == "newton" and exponent is not None and round(1 / exponent) * exponent != 1:
            raise ValueError(f"exponent={exponent}: Newton's iteration needs 1 / p for an integer p")
        self.frequency, self.start = frequency, frequency if start is None else start
        self.max_dim, self.exponent, self.merge, self.correct_bias = max_dim, exponent, merge, correct_bias
        self.grafting = Grafting("none") if grafting is None else grafting
        self.damping: Damping = damping
        self.root: Root = root
        self.defaults = {"betas": tuple(betas), "eps": eps, **self.grafting.defaults}

    def sides(self, p: Param) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return p.matrix

    def grid(self, p: Param) -> BlockGrid:
        """The blocks of a parameter, or of each of stacked experts."""
        rows, columns = self.sides(p)
        if self.merge and rows * columns <= self.max_dim:
            rows, columns = rows * columns, 1
        return BlockGrid(max(rows, 1), max(columns, 1), self.max_dim)

    def slots(self, p: Param) -> dict[str, Slot]:
        grid, experts = self.grid(p), tuple(p.shape[:-2]) if p.role == "experts" else ()
        made = {"exp_avg": Slot(tuple(p.shape)), **self.grafting.slots(p)}
        for side, shape in zip(_sides(grid), (grid.row_shape(grid.height), grid.column_shape(grid.width)), strict=True):
            follows = (*((0,) if experts else ()), *(None,) * (len(experts) - 1 if experts else 0), None, None, None)
            for name in (side, f"{side}_root") if side else ():
                made[name] = Slot((*experts, *shape), kind="exact", dims=follows)
        return made

    def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float]:
        b1, b2 = map(float, hyper["betas"])
        return {
            "b1": b1,
            "c1": 1 - b1,
            "keep": b2,
            "take": 1 - b2 if b2 < 1.0 else 1.0,
            "debias1": 1 / (1 - b1**step) if self.correct_bias else 1.0,
            "debias2": 1 / (1 - b2**step) if self.correct_bias and b2 < 1.0 else 1.0,
            "eps": float(hyper["eps"]),
            "due": float(step == self.start or (step > self.start and step % self.frequency == 0)),
            "started": float(step >= self.start),
            **self.grafting.scalars(step, hyper),
        }

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        m = state["exp_avg"] = k.b1 * state["exp_avg"] + k.c1 * u
        M = k.debias1 * m
        grafted = self.grafting.step(M, u, state, k)
        if not u.numel():
            return grafted
        grid = self.grid(k.param)

        def seen(t: Tensor) -> list[Tensor]:
            shape = t.shape[:-2] if t.ndim > 2 and k.param.role == "experts" else ()
            return grid.cut(t.reshape(*shape, grid.rows, grid.columns))

        self._gather(seen(u), state, grid, k)
        if k.due:
            self._take_roots(state, grid, k)
        if not k.started:
            return grafted
        tiles = seen(M)
        left, right = _sides(grid)
        if left:
            tiles = [iL @ t for iL, t in zip(square(grid.of_rows(state["L_root"])), tiles, strict=True)]
        if right:
            tiles = [t @ iR for iR, t in zip(square(grid.of_columns(state["R_root"])), tiles, strict=True)]
        if self.grafting.kind != "none":
            tiles = [with_norm_of(t, like) for t, like in zip(tiles, seen(grafted), strict=True)]
        return grid.join(tiles).reshape(u.shape)

    def _gather(self, tiles: list[Tensor], state: State, grid: BlockGrid, k: Context) -> None:
        """The newest gradient joins the moments."""
        left, right = _sides(grid)
        if left:
            state["L"] = k.keep * state["L"] + k.take * grid.stored_rows([t @ t.mT for t in tiles])
        if right:
            state["R"] = k.keep * state["R"] + k.take * grid.stored_columns([t.mT @ t for t in tiles])

    def _take_roots(self, state: State, grid: BlockGrid, k: Context) -> None:
        sides = [side for side in _sides(grid) if side]
        exponent = 0.5 / len(sides) if len(sides) == 1 or self.exponent is None else self.exponent
        for side in sides:
            cut, stored = (grid.of_rows, grid.stored_rows) if side == "L" else (grid.of_columns, grid.stored_columns)
            moments, old = square(cut(state[side])), square(cut(state[f"{side}_root"]))
            found = [self._root(k.debias2 * A, exponent, k.eps) for A in moments]
            usable = [root.isfinite().all(-1).all(-1)[..., None, None] for root in found]
            state[f"{side}_root"] = stored([torch.where(*three) for three in zip(usable, found, old, strict=True)])

    def _root(self, A: Tensor, exponent: float, eps: float) -> Tensor:
        if self.root == "eigh":
            return inverse_root(A, exponent, eps, self.damping)
        largest = A.abs().sum(-1).amax(-1)  # no eigenvalue is larger
        least = RIDGE if A.dtype == torch.float32 else 0.0
        return coupled_newton(A, round(1 / exponent), (least * largest).clamp(min=eps))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.frequency}, grafting={self.grafting.kind!r}, max_dim={self.max_dim})"


class kronecker_vector(kronecker):
    """`kronecker` of parameters that are no matrices, each as one vector: `L^(-1/2) M`, full-matrix Adagrad block by block."""

    unit = "tensor"

    def sides(self, p: Param) -> tuple[int, int]:
        return p.shape.numel(), 1


def as_matrix(p: Param) -> str | None:
    """Takes every parameter with two dimensions or more: hidden matrices, convolutions, experts, embeddings and heads."""
    if len(p.shape) < 2 or p.role in ("norm", "bias", "vector", "scalar"):
        return None
    rows, columns = p.matrix
    return f"{p.role} as {rows} x {columns}"


def _sides(grid: BlockGrid) -> tuple[str, str]:
    """Names of the moments of rows and of columns; empty for a side that has none."""
    right = "R" if grid.columns > 1 else ""
    return "L" if grid.rows > 1 or not right else "", right


__all__ = ["Root", "as_matrix", "kronecker", "kronecker_vector"]
