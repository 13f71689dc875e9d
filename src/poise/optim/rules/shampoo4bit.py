"""4-bit Shampoo: preconditioners kept as eigenvalues and eigenvectors of 4 bits, before SGD or AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from poise.catalog import Paper, choice, log_uniform, method
from poise.linalg.block_grid import BlockGrid, square
from poise.linalg.eigenbasis import rectify
from poise.memory.linear2 import dequantize, packed_shape, quantize

from ..optimizer import Optimizer
from ..options import Options
from ..routing import Params, Route, everything
from ..transform import Context, Param, Slot, State, Transform, chain
from ..transforms.adaptive import adam
from ..transforms.grafting import with_norm_of
from ..transforms.kronecker import as_matrix
from ..transforms.momentum import momentum as momentum_link
from ..transforms.step import add_l2, displacement, scale_by_lr

Base = Literal["adamw", "sgd"]

SMALLEST = 4096  # entries of a square matrix from which on 4 bits are worth it
FIRST = 1e-6  # every eigenvalue, before there are statistics


class kept_eigenvectors(Transform):
    """The update between inverse fourth roots of its moments, with the gradient's length. See `Shampoo4Bit`.

    Slots of one side, "L" of rows or "R" of columns: `values`; `vectors`, one in each row, and the root without its diagonal,
    coded, with their scales; `root_diagonal`. Where the last block of a side is too small for codes, it stands beside them, as
    `vectors_last` and `root_last`. Until the first refresh all count as those of the identity.
    """

    unit = "matrix"

    def __init__(
        self,
        beta: float = 0.95,
        eps: float = 1e-6,
        every: int = 100,
        root_every: int = 500,
        max_order: int = 1200,
        rectifications: tuple[int, int] = (1, 4),
        bits: Literal[4, 32] = 4,
    ) -> None:
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"shampoo_beta={beta}: must be in [0, 1)")
        if not eps > 0.0:
            raise ValueError(f"shampoo_eps={eps}: must be positive")
        for name, value in (("statistics_every", every), ("roots_every", root_every), ("max_order", max_order)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if len(rectifications) != 2 or min(rectifications) < 0:
            raise ValueError(f"rectifications={rectifications}: two numbers that are not negative are needed")
        if bits not in (4, 32):
            raise ValueError(f"bits={bits}: must be 4 or 32")
        self.statistics_every, self.roots_every, self.max_order = every, root_every, max_order
        self.rectifications, self.bits = rectifications, bits
        self.defaults = {"shampoo_beta": beta, "shampoo_eps": eps}

    def grid(self, p: Param) -> BlockGrid:
        """The blocks of a parameter, or of each of stacked experts."""
        return BlockGrid(*p.matrix, self.max_order)

    def coded(self, order: int) -> bool:
        """Whether matrices of this order are kept in 4 bits."""
        return self.bits == 4 and order * order >= SMALLEST

    def slots(self, p: Param) -> dict[str, Slot]:
        grid, experts = self.grid(p), tuple(p.shape[:-2]) if p.role == "experts" else ()
        made: dict[str, Slot] = {}

        def keep(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
            follows = (0,) + (None,) * (len(experts) + len(shape) - 1) if experts else (None,) * len(shape)
            made[name] = Slot((*experts, *shape), dtype, kind="exact", dims=follows)

        for side, order, of in (("L", grid.height, grid.row_shape), ("R", grid.width, grid.column_shape)):
            keep(f"{side}_values", of(1))
            keep(f"{side}_root_diagonal", of(1))
            for name in (f"{side}_vectors", f"{side}_root"):
                if self.coded(order):
                    packed, scales = packed_shape(order)
                    keep(name, of(packed), torch.uint8)
                    keep(f"{name}_scale", of(scales))
                    rest = of(1)[1] % order
                    if rest and not self.coded(rest):
                        keep(f"{name}_last", (of(1)[0], rest, rest))
                else:
                    keep(name, of(order))
        return made

    def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float]:
        beta = float(hyper["shampoo_beta"])
        return {
            "beta": beta,
            "rest": 1 - beta,
            "eps": float(hyper["shampoo_eps"]),
            "gathers": float(step % self.statistics_every == 0),
            "known": float(step > self.statistics_every),  # whether statistics of an earlier step are kept
            "gathered": float(step >= self.statistics_every),
            "renews": float(step % self.roots_every == 0),
            "rooted": float(step >= self.roots_every),
        }

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        if not u.numel():
            return u
        grid = self.grid(k.param)
        sides = (("L", grid.of_rows, grid.stored_rows), ("R", grid.of_columns, grid.stored_columns))
        tiles = grid.cut(u)
        for side, cut, stored in sides:
            if k.gathers:
                grams = [t @ t.mT if side == "L" else t.mT @ t for t in tiles]
                values, vectors = self._statistics(side, cut, tiles, state, bool(k.known))
                found = [self._follow(*three, k) for three in zip(values, vectors, grams, strict=True)]
                state[f"{side}_values"] = stored([s for s, _ in found])
                self._keep(f"{side}_vectors", stored([V for _, V in found]), state)
            if k.renews:
                values, vectors = self._statistics(side, cut, tiles, state, bool(k.gathered))
                roots = [self._root(*pair, k.eps) for pair in zip(values, vectors, strict=True)]
                diagonals = [root.diagonal(dim1=-2, dim2=-1) for root in roots]
                rest = [root - d.diag_embed() for root, d in zip(roots, diagonals, strict=True)]
                state[f"{side}_root_diagonal"] = stored([d[..., None] for d in diagonals])
                self._keep(f"{side}_root", stored(rest), state)
        if k.rooted:
            left, right = (self._kept_roots(side, cut, state) for side, cut, _ in sides)
            tiles = [iL @ t @ iR for iL, t, iR in zip(left, tiles, right, strict=True)]
        return with_norm_of(grid.join(tiles), u, 1e-12)

    def _statistics(
        self, side: str, cut: Any, tiles: list[Tensor], state: State, known: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Eigenvalues (..., h, 1) and eigenvectors, one in each row, of every block."""
        if known:
            return cut(state[f"{side}_values"]), square(cut(self._kept(f"{side}_vectors", state)))
        orders = [t.shape[-2 if side == "L" else -1] for t in tiles]
        identities = [t.new_ones(*t.shape[:-2], n).diag_embed() for t, n in zip(tiles, orders, strict=True)]
        return [t.new_full((*t.shape[:-2], n, 1), FIRST) for t, n in zip(tiles, orders, strict=True)], identities

    def _rectified(self, V: Tensor, which: int) -> Tensor:
        """What 4 bits have made of eigenvectors, made orthogonal again."""
        return rectify(V, self.rectifications[which]) if self.coded(V.shape[-1]) else V

    def _follow(self, s: Tensor, V: Tensor, gram: Tensor, k: Context) -> tuple[Tensor, Tensor]:
        """The moments with the newest gradient, and one step of orthogonal iteration towards their eigenvectors."""
        V = self._rectified(V, 0)
        A = k.beta * (V.mT @ (s * V)) + k.rest * gram
        Q = torch.linalg.qr(A @ V.mT).Q
        return (Q * (A @ Q)).sum(-2)[..., None], Q.mT

    def _root(self, s: Tensor, V: Tensor, eps: float) -> Tensor:
        V = self._rectified(V, 1)
        s = s.clamp(min=0)  # rounding
        damped = (s + eps * s.amax(-2, keepdim=True)).clamp(min=torch.finfo(s.dtype).tiny)
        return V.mT @ (damped.pow(-0.25) * V)

    def _kept_roots(self, side: str, cut: Any, state: State) -> list[Tensor]:
        rest, diagonals = square(cut(self._kept(f"{side}_root", state))), cut(state[f"{side}_root_diagonal"])
        return [r + d[..., 0].diag_embed() for r, d in zip(rest, diagonals, strict=True)]

    def _keep(self, name: str, rows: Tensor, state: State) -> None:
        if f"{name}_scale" in state:
            state[name], state[f"{name}_scale"] = quantize(rows)
        else:
            state[name] = rows
        if f"{name}_last" in state:
            n = state[f"{name}_last"].shape[-1]
            state[f"{name}_last"] = rows[..., -n:, :n]

    def _kept(self, name: str, state: State) -> Tensor:
        if f"{name}_scale" not in state:
            return state[name]
        codes = state[name]
        rows = dequantize(codes, state[f"{name}_scale"], 2 * codes.shape[-1])
        if f"{name}_last" not in state:
            return rows
        last = state[f"{name}_last"]
        n = last.shape[-1]
        return torch.cat([rows[..., :-n, :], torch.nn.functional.pad(last, (0, rows.shape[-1] - n))], dim=-2)

    def __repr__(self) -> str:
        return f"kept_eigenvectors({self.statistics_every}, {self.roots_every}, bits={self.bits})"


def _matrices(p: Param) -> str | None:
    """Takes what has two sides longer than 1."""
    return as_matrix(p) if len(p.shape) > 1 and min(p.matrix) > 1 else None


@method(
    "shampoo-4bit",
    family="optim",
    paper=Paper("4-bit Shampoo for Memory-Efficient Network Training", arxiv="2405.18144", year=2024),
    tune={
        "lr": log_uniform(1e-4, 3e-2),
        "weight_decay": log_uniform(1e-3, 1.0),
        "shampoo_beta": choice(0.9, 0.95, 0.99),
        "statistics_every": choice(5, 10),
        "roots_every": choice(10, 20),
    },
    mutant=("self._rectified(V, 1)", "V"),
    exempt={
        "the_state_of_a_large_matrix_takes_the_bytes_it_should": "the preconditioners are 4-bit codes already, 2.25 bytes an "
        "element of a square matrix; a format makes the moments beside them smaller",
    },
)
class Shampoo4Bit(Optimizer):
    """Shampoo in front of AdamW or SGD, with preconditioners of 4 bits an entry.

    For each block of at most `max_order` rows and columns of each matrix (rows = outputs; a convolution as (out, in * kernel),
    each of stacked experts on its own), with `L = V diag(s) V^T` of its rows, and R likewise of its columns by G^T G:

        every T1 steps:   V <- 1.5 V - 0.5 V V^T V;   A = b V diag(s) V^T + (1 - b) G G^T
                          V <- Q of the QR factorization of A V;   s <- diag(V^T A V)              V is kept in 4 bits
        every T2 steps:   V rectified four times;   L^(-1/4) = V diag((s + eps max s)^(-1/4)) V^T  kept in 4 bits and a diagonal
        each step:        u = L^(-1/4) G R^(-1/4);   u <- u ||G|| / (||u|| + 1e-12)                over the whole matrix
                          AdamW or SGD on u in the gradient's place

    T1 counts from step T1 on, and both refreshes see the newest gradient. Before its first refresh a root is I. Vectors, and
    matrices with a side of length 1, go to the base rule as they are.

    Codes are those of `poise.memory.linear2`: 64 neighbouring entries of an eigenvector share a scale. Rounded eigenvectors are
    nearly orthogonal, and one iteration makes them so again; the rounded moments themselves would lose all small eigenvalues,
    to which the root gives the most weight.

    Args:
        lr: 1e-3, for AdamW. For base="sgd" the authors take 0.1.
        base: "adamw"; "sgd": weight decay is added to u, then heavy-ball momentum; or any rule, which sees u as its gradient,
            with decoupled decay.
        betas, eps: (0.9, 0.999), 1e-8, of AdamW. momentum: 0.9, of SGD.
        weight_decay: 0.
        shampoo_beta: b, 0.95. shampoo_eps: 1e-6.
        statistics_every, roots_every: T1 and T2, 100 and 500.
        max_order: 1200.
        rectifications: (1, 4), before the statistics and before the root, of what is kept in 4 bits.
        bits: 4; 32 keeps eigenvectors and roots as they are.
        options: see `Optimizer`.

    State: that of the base rule, and 2.25 bytes per element of a square matrix. Blocks of fewer than 4096 entries (of an order
    below 64) stay in float32: up to 16 bytes per element. Source: "4-bit Shampoo for Memory-Efficient Network Training" (arXiv
    2405.18144) and its release, in the form with eigenvectors.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        base: Base | Transform = "adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        shampoo_beta: float = 0.95,
        shampoo_eps: float = 1e-6,
        statistics_every: int = 100,
        roots_every: int = 500,
        max_order: int = 1200,
        rectifications: tuple[int, int] = (1, 4),
        bits: Literal[4, 32] = 4,
        **options: Unpack[Options],
    ) -> None:
        if base == "adamw":
            rest = [adam(betas, eps)]
        elif base == "sgd":
            rest = [add_l2(), momentum_link(momentum), scale_by_lr(), displacement()]
        elif isinstance(base, Transform):
            rest = [base]
        else:
            raise ValueError(f"base={base!r}: must be 'adamw', 'sgd' or a rule")
        kept = kept_eigenvectors(shampoo_beta, shampoo_eps, statistics_every, roots_every, max_order, rectifications, bits)
        routes = [
            Route("shampoo", chain(kept, *rest), _matrices, optional=True),
            Route("rest", chain(*rest), everything),
        ]
        super().__init__(params, routes, lr, weight_decay, **options)
