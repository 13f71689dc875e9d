"""A preconditioner made of the last m gradients: all it ever needs of them is their products with each other.

What stands here knows how the products are kept and used; how the gradients themselves are kept, as they come, sparse or as
low-rank factors, is said by a `Rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from poise.linalg.woodbury import row_weights

from ..transform import Context, Param, Slot, State, Transform, Unit

Per = Literal["model", "tensor"]
Weigh = Callable[[Tensor, int, Tensor, Mapping[str, float]], Tensor]
FULL = (torch.float32, torch.float64)
CONVERTED = 2**22  # elements of a window in few bits that are converted at once


class Rows(Protocol):
    """How one parameter's part of the window is kept: m rows, of which the engine of the window sees products and sums only."""

    unit: Unit  # what of the parameter it sees

    def slots(self, p: Param, m: int) -> dict[str, Slot]:
        """Its state."""
        ...

    def put(self, r: int, u: Tensor, state: State, k: Context) -> None:
        """Make `u`, or what is kept of it, row r."""
        ...

    def dots(self, r: int, state: State, like: Tensor) -> Tensor:
        """Products of row r with all rows, (m,), in float64; `like` is an update."""
        ...

    def combine(self, weights: Tensor, state: State, like: Tensor, p: Param) -> Tensor:
        """The sum of all rows by their weights (m,), in the shape of an update."""
        ...


class DenseRows:
    """Gradients as they come, in the dtype asked for (float32 stands for that of the computation): m values an element.

    A row is rounded before it is used, so that products and sums are of the same numbers.
    """

    unit: Unit = "piece"

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype

    def slots(self, p: Param, m: int) -> dict[str, Slot]:
        dims = (None, *range(len(p.shape)))
        return {"window": Slot((m, *p.shape), self.dtype, kind="exact", dims=dims)}

    def put(self, r: int, u: Tensor, state: State, k: Context) -> None:
        window = state["window"]
        window[r] = u
        state["window"] = window

    def dots(self, r: int, state: State, like: Tensor) -> Tensor:
        window = state["window"]
        new = _full(window[r].reshape(-1))
        return torch.cat([rows @ new for rows in _some(window)]).double()

    def combine(self, weights: Tensor, state: State, like: Tensor, p: Param) -> Tensor:
        total, at = torch.zeros_like(like).reshape(-1), 0
        for rows in _some(state["window"]):
            total += weights[at : at + len(rows)].to(rows.dtype) @ rows
            at += len(rows)
        return total.reshape(like.shape)


def _some(window: Tensor) -> Iterator[Tensor]:
    """The rows, flat and in full precision: all at once where they are kept in it, else a few at a time."""
    size = window[0].numel()
    count = len(window) if window.dtype in FULL else max(1, CONVERTED // max(size, 1))
    return (_full(rows).reshape(len(rows), size) for rows in window.split(count))


def _full(values: Tensor) -> Tensor:
    return values if values.dtype in FULL else values.float()


def fisher(gram: Tensor, row: int, age: Tensor, hyper: Mapping[str, float]) -> Tensor:
    """Weights of the rows in `(damping I + 1/m sum_i g_i g_i^T)^(-1) g`, g being one of them."""
    return row_weights(gram, row, hyper["damping"], 1 / len(gram))


class windowed(Transform):
    """The update, preconditioned by a window of the last m updates, of which it is the newest.

        row t mod m of G <- u;   result G^T w,  w = weigh(G G^T)

    Only the m products of the new row are computed in a step; the others are kept. A parameter without gradient has a zero row.
    Rows are counted by the steps of the rule: of several rules that hold one window, all must step whenever one does.

    Args:
        rows: how the rows are kept.
        m: the window.
        weigh: w from `(gram, row, age, hyper)`: the products (m, m) in float64, the place of u, the steps since each row was
            written (m,), and `hyper`.
        hyper: hyper-parameters that `weigh` reads.
        per: "model": all parameters whose rule holds this object are one vector; "tensor": each has a window of its own.
    """

    reads = "update"

    def __init__(self, rows: Rows, m: int, weigh: Weigh, hyper: Mapping[str, float], per: Per = "model") -> None:
        check_window(m)
        if per not in get_args(Per):
            raise ValueError(f"per={per!r}: must be one of {', '.join(map(repr, get_args(Per)))}")
        self.rows, self.m, self.weigh, self.per = rows, m, weigh, per
        self.unit = rows.unit  # type: ignore[misc]
        self.defaults = dict(hyper)

    def slots(self, p: Param) -> dict[str, Slot]:
        model = self.per == "model"
        gram = Slot((self.m, self.m), torch.float64, kind="exact", shared=model)
        written = {"written": Slot((self.m,), torch.int64, kind="exact")} if model else {}
        return {**self.rows.slots(p, self.m), **written, "gram": gram}

    def time(self, k: Context) -> int:
        """Steps that the window has seen, this one included."""
        return k.clock if self.per == "model" else k.step

    def measure(self, u: Tensor, state: State, x: Tensor, k: Context) -> dict[str, Tensor]:
        t = self.time(k)
        r = (t - 1) % self.m
        self.rows.put(r, u, state, k)
        if self.per == "model":
            written = state["written"]
            written[r] = t
            state["written"] = written
        return {"dots": self.held(self.rows.dots(r, state, u), state, t)}

    def reduce(self, totals: dict[str, Tensor], shared: State, k: Context) -> dict[str, Tensor]:
        if self.per == "tensor":
            return {}
        return {"weights": self.weights(totals["dots"], shared, k)}

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        if self.per == "tensor":
            return self.rows.combine(self.weights(k.own["dots"], state, k), state, u, k.param)
        return self.rows.combine(self.held(k.total["weights"], state, k.clock), state, u, k.param)

    def held(self, values: Tensor, state: State, t: int) -> Tensor:
        """`values` of the rows, zero where this parameter had no gradient when the row was written and holds an older one."""
        if self.per == "tensor":
            return values
        return torch.where(state["written"] > t - self.m, values, 0.0)

    def weights(self, dots: Tensor, state: State, k: Context) -> Tensor:
        """Keep the new row's products, and weigh the rows."""
        t = self.time(k)
        r = (t - 1) % self.m
        gram = state["gram"].clone()
        gram[r], gram[:, r] = dots, dots
        state["gram"] = gram
        # what rounding leaves of the products must not make them those of no vectors at all
        noise = torch.finfo(torch.float64 if k.param.dtype == torch.float64 else torch.float32).eps
        gram = gram + noise * gram.trace() * torch.eye(self.m, dtype=gram.dtype, device=gram.device)
        age = (t - 1 - torch.arange(self.m, device=gram.device)) % self.m
        return self.weigh(gram, r, age, {name: getattr(k, name) for name in self.defaults})


def check_window(window: int) -> None:
    """A number of gradients, or ValueError."""
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"window={window!r}: must be a positive number of gradients")


def check_damping(damping: float) -> None:
    """A positive number, or ValueError."""
    if not damping > 0:
        raise ValueError(f"damping={damping}: must be positive")


__all__ = ["DenseRows", "Per", "Rows", "Weigh", "check_damping", "check_window", "fisher", "windowed"]
