"""Gradients of a window that are kept in little space, with what that leaves out added to the next one.

    e <- e + u;   row <- compress(e);   e <- e - row

so that all rows there ever were and e add up to all updates there ever were.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from poise.linalg.power_iteration import power_step
from poise.memory.sparse import TopK, add_at

from ..transform import Context, Param, Slot, State, Unit
from .gradient_window import DenseRows

AT_ONCE = 2**20  # kept entries whose places are widened at once


class SparseRows:
    """The largest entries of each block: `m density` values an element with their int16 places, and 1 value for e.

    Args:
        top: which entries.
        dtype: of their values; what rounding takes from them stays in e.
        error_feedback: without it e is 0.
    """

    unit: Unit = "tensor"

    def __init__(self, top: TopK, dtype: torch.dtype, error_feedback: bool = True) -> None:
        self.top, self.dtype, self.error_feedback = top, dtype, error_feedback

    def slots(self, p: Param, m: int) -> dict[str, Slot]:
        kept = (m, self.top.kept(p.shape.numel()))
        rows = {"places": Slot(kept, torch.int16, kind="exact"), "values": Slot(kept, self.dtype, kind="exact")}
        return rows | _error(p, self.error_feedback)

    def put(self, r: int, u: Tensor, state: State, k: Context) -> None:
        e = _corrected(u, state).reshape(-1)
        places, values = state["places"], state["values"]
        places[r] = self.top.choose(e)
        where = self.top.where(places[r], e.numel())
        values[r] = e[where].to(values.dtype)
        state["places"], state["values"] = places, values
        e[where] -= values[r].to(e.dtype)
        _left(e.reshape(u.shape), state)

    def dots(self, r: int, state: State, like: Tensor) -> Tensor:
        d = like.numel()
        new = like.new_zeros(d)
        new[self.top.where(state["places"][r], d)] = state["values"][r].to(like.dtype)
        return torch.cat([(values * new[where]).sum(1).double() for where, values in self._some(state, like)])

    def combine(self, weights: Tensor, state: State, like: Tensor, p: Param) -> Tensor:
        total, at = like.new_zeros(like.numel()), 0
        for where, values in self._some(state, like):
            scaled = weights[at : at + len(values), None].to(like.dtype) * values
            add_at(total, where.reshape(-1), scaled.reshape(-1))
            at += len(values)
        return total.reshape(like.shape)

    def _some(self, state: State, like: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """A few rows at a time: indices into the flat parameter, and values."""
        count = max(1, AT_ONCE // max(state["places"].shape[1], 1))
        for places, values in zip(state["places"].split(count), state["values"].split(count), strict=True):
            yield self.top.where(places, like.numel()), values.to(like.dtype)


class LowRankRows:
    """Two thin factors P, Q of each matrix by a step of power iteration: `m r (rows + columns)` values, 1 an element for e.

    Convolutions are (out, in * kernel), stacked experts matrices of their own; vectors are kept whole. Q starts from normal
    numbers, and from where the last step left it.
    """

    unit: Unit = "tensor"

    def __init__(self, rank: int, error_feedback: bool = True) -> None:
        self.rank, self.error_feedback, self.whole = rank, error_feedback, DenseRows()

    def slots(self, p: Param, m: int) -> dict[str, Slot]:
        if not _is_matrix(p):
            return self.whole.slots(p, m)
        rows, columns = p.matrix
        stack = tuple(p.shape[:-2]) if p.role == "experts" else ()
        r = min(self.rank, rows, columns)
        factors = {
            "left": Slot((m, *stack, rows, r), kind="exact"),
            "right": Slot((m, *stack, columns, r), kind="exact"),
            "basis": Slot((*stack, columns, r), kind="exact"),
        }
        return factors | _error(p, self.error_feedback)

    def put(self, r: int, u: Tensor, state: State, k: Context) -> None:
        if "left" not in state:
            self.whole.put(r, u, state, k)
            return
        e = _corrected(u, state)
        M = _as_matrix(e, k.param)
        Q = _normal(k.uniform(), state["basis"]) if k.step == 1 else state["basis"]
        P, Q = power_step(M, Q)
        left, right = state["left"], state["right"]
        left[r], right[r] = P, Q
        state["left"], state["right"], state["basis"] = left, right, Q
        _left(e - _stored(P @ Q.mT, k.param), state)

    def dots(self, r: int, state: State, like: Tensor) -> Tensor:
        if "left" not in state:
            return self.whole.dots(r, state, like)
        left, right = state["left"], state["right"]
        return ((left.mT @ left[r]) * (right.mT @ right[r])).double().flatten(1).sum(1)

    def combine(self, weights: Tensor, state: State, like: Tensor, p: Param) -> Tensor:
        if "left" not in state:
            return self.whole.combine(weights, state, like, p)
        left = torch.einsum("m,m...ir->...imr", weights.to(like.dtype), state["left"]).flatten(-2)
        right = state["right"].movedim(0, -2).flatten(-2)
        return _stored(left @ right.mT, p)


def _error(p: Param, kept: bool) -> dict[str, Slot]:
    return {"error": Slot(tuple(p.shape), kind="exact")} if kept else {}


def _corrected(u: Tensor, state: State) -> Tensor:
    """The update with what was left out before, in memory of its own."""
    return u + state["error"] if "error" in state else u.clone()


def _left(e: Tensor, state: State) -> None:
    if "error" in state:
        state["error"] = e


def _is_matrix(p: Param) -> bool:
    return len(p.shape) > 1 and p.shape.numel() > 0


def _as_matrix(t: Tensor, p: Param) -> Tensor:
    """As (..., outputs, inputs * kernel)."""
    if p.role == "experts":
        return t.mT if p.inputs_first else t
    return (t.movedim(1, 0) if p.inputs_first else t).flatten(1)


def _stored(M: Tensor, p: Param) -> Tensor:
    """The inverse of `_as_matrix`."""
    if p.role == "experts":
        return M.mT if p.inputs_first else M
    if not p.inputs_first:
        return M.reshape(p.shape)
    return M.reshape(p.shape[1], p.shape[0], *p.shape[2:]).movedim(0, 1)


def _normal(uniform: Tensor, like: Tensor) -> Tensor:
    """Normal numbers in the shape of `like`, from as many uniform ones of a larger tensor."""
    symmetric = (2 * uniform.reshape(-1)[: like.numel()].double() - 1).clamp(min=-1 + 2**-53)
    return (math.sqrt(2.0) * torch.erfinv(symmetric)).to(like.dtype).reshape(like.shape)


__all__ = ["LowRankRows", "SparseRows"]
