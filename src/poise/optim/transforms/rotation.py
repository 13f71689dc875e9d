"""Rules driven in a rotated space: in the eigenbasis of the gradient's own statistics, which is refreshed now and then.

For example, SOAP is `chain(rotated(adam(...)), debias(...))`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from poise.linalg import block_diagonal as bd
from poise.linalg.eigenbasis import eigenbasis, power_step
from poise.memory.rounding import stochastic_bf16

from ..transform import Context, Param, Slot, State, Transform

Form = Literal["compact", "full"]
Sides = Literal["both", "left", "right"]

BUDGET = 12.0  # bytes for each entry of a matrix that "compact" keeps to: half of what the published form takes on a square one
# Of bfloat16 numbers, what changes an average by less than this part of itself is lost when it is rounded to nearest.
SLOW = 2.0**-5


class rotated(Transform):
    r"""A rule driven in the eigenbasis of the gradient's left and right second moments.

    For each matrix (rows = outputs; a convolution as (out, in * kernel), each of stacked experts on its own):

        u <- Q_L rule( Q_L^T u Q_R ) Q_R^T;      then  L <- beta L + G G^T,  R <- beta R + G^T G

    with `Q_L`, `Q_R` the eigenvectors of L and R, largest eigenvalue first. The first call only gathers: it sets `L = G G^T`,
    `R = G^T G` and finds their eigenvectors, so that no gradient ever shapes the basis that it is seen in. After each
    `frequency` steps from then on the bases follow L and R by one `power_step`, and the rule's state is carried over: signed
    state as a matrix, second moments, which cannot be rotated, in the new order of the basis vectors.

    Args:
        inner: the rule. Its state lives in the rotated space, and steps are counted for it without the first call.
        frequency: steps between refreshes of the bases.
        shampoo_beta: of L and R; None takes the second of the group's `betas`.
        max_precond_dim: a side longer than this has no factor and is not rotated.
        form: "full" keeps whole factors in float32. "compact" keeps L, R, Q_L, Q_R in bfloat16 and, where these and float32
            momentum would take more than 12 bytes an entry, only the diagonal blocks of a factor: the larger block is halved
            until they fit. The first blocks of a side hold neighbouring rows or columns, the last one those that are left.
        block_size: the longest block allowed in either form; None for no bound.
        sides: "left" rotates outputs only, "right" inputs only.

    State: `L`, `Q_L` (rows x block) and `R`, `Q_R` (columns x block), never encoded, beside the inner rule's.

    (1 - beta) stands nowhere: it would scale L and R, of which only eigenvectors are used. In bfloat16 what moves slowly (beta
    above 0.97) is rounded stochastically; to nearest, it would stand still.

    Raises:
        ValueError: for a setting that is none of these.

    Source: "SOAP: Improving and Stabilizing Shampoo using Adam" (arXiv 2409.11321).
    """

    unit = "matrix"

    def __init__(
        self,
        inner: Transform,
        frequency: int = 10,
        shampoo_beta: float | None = None,
        max_precond_dim: int = 10000,
        form: Form = "compact",
        block_size: int | None = None,
        sides: Sides = "both",
    ) -> None:
        for name, value in (("precondition_frequency", frequency), ("block_size", block_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if max_precond_dim < 0:
            raise ValueError(f"max_precond_dim={max_precond_dim}: must not be negative")
        if form not in get_args(Form):
            raise ValueError(f"form={form!r}: must be one of {', '.join(get_args(Form))}")
        if sides not in get_args(Sides):
            raise ValueError(f"sides={sides!r}: must be one of {', '.join(get_args(Sides))}")
        if shampoo_beta is not None and not 0.0 <= shampoo_beta < 1.0:
            raise ValueError(f"shampoo_beta={shampoo_beta}: must be in [0, 1), or None")
        if shampoo_beta is None and "betas" not in inner.defaults:
            raise ValueError(f"shampoo_beta=None: the inner rule {inner!r} has no betas to take it from; set it")
        self.inner, self.every, self.blind = (inner,), frequency, inner.blind
        self.max_precond_dim, self.form, self.block_size, self.sides = max_precond_dim, form, block_size, sides
        self.defaults = {"shampoo_beta": shampoo_beta}

    def block_sizes(self, p: Param) -> tuple[int, int]:
        """The block sizes of L and R; 0 for a side without a factor."""
        rows, columns = p.matrix
        rotates = {"both": (True, True), "left": (True, False), "right": (False, True)}[self.sides]
        left, right = (
            min(size, self.block_size or size) if asked and 1 < size <= self.max_precond_dim else 0
            for size, asked in zip((rows, columns), rotates, strict=True)
        )
        while self.form == "compact" and 4 + 4 * (left * rows + right * columns) / (rows * columns) > BUDGET:
            if (left, rows) >= (right, columns):
                left = math.ceil(left / 2)
            else:
                right = math.ceil(right / 2)
        return left, right

    def slots(self, p: Param) -> dict[str, Slot]:
        left, right = self.block_sizes(p)
        experts = tuple(p.shape[:-2]) if p.role == "experts" else ()
        dtype = torch.bfloat16 if self.form == "compact" else torch.float32
        made: dict[str, Slot] = {}
        for names, size, block, dim in (
            (("L", "Q_L"), p.matrix[0], left, 1 if p.inputs_first else 0),
            (("R", "Q_R"), p.matrix[1], right, 0 if p.inputs_first else 1),
        ):
            follows = (0,) + (None,) * (len(experts) + 1) if experts else (dim if p.shape[dim] == size else None, None)
            for name in names if block else ():
                made[name] = Slot((*experts, size, block), dtype, kind="exact", dims=follows)
        return made

    def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float] | None:
        beta = hyper["shampoo_beta"]
        return None if step == 1 else {"keep": float(hyper["betas"][1] if beta is None else beta)}

    def due(self, step: int) -> bool:
        """Before the first call, and before those that follow steps `every`, `2 every`, ..., counted without the first call."""
        return step == 1 or (step > 2 and (step - 2) % self.every == 0)

    def inner_step(self, step: int) -> int:
        return step - 1

    def refresh(self, u: Tensor, state: State, x: Tensor, k: Context) -> None:
        if k.step == 1:
            for side, name, basis in ((u, "L", "Q_L"), (u.mT, "R", "Q_R")):
                if name in state:
                    state[name] = bd.gram(side, state[name].shape[-1]).to(state[name].dtype)
                    state[basis] = _map(eigenbasis, state[name].to(u.dtype)).to(state[basis].dtype)
            return
        before = _bases(state, u.dtype)
        left, right = (_follow(state, name, basis, u.dtype) for name, basis in (("L", "Q_L"), ("R", "Q_R")))
        after = _bases(state, u.dtype)
        k.inner[0].rebase(lambda t: _rotate(_rotate(t, before, back=True), after), lambda t: _reorder(t, left, right))

    def enter(self, u: Tensor, state: State, x: Tensor, k: Context) -> tuple[Tensor | None, ...]:
        return (_rotate(u, _bases(state, u.dtype)),)

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        bases = _bases(state, u.dtype)
        out = _rotate(k.inner[0].apply(_rotate(u, bases)), bases, back=True)
        for side, name in ((u, "L"), (u.mT, "R")):
            if name in state:
                new = k.keep * state[name].to(u.dtype) + bd.gram(side, state[name].shape[-1])
                state[name] = _rounded(new, k) if self.form == "compact" and 1 - k.keep < SLOW else new.to(state[name].dtype)
        return out

    def update_rms(self, p: Param) -> float | None:
        return self.inner[0].update_rms(p)  # a rotation keeps it

    def __repr__(self) -> str:
        return f"rotated({self.inner[0]!r}, {self.every}, form={self.form!r}, sides={self.sides!r})"


Bases = tuple[Tensor | None, Tensor | None]


def _bases(state: State, dtype: torch.dtype) -> Bases:
    """Q_L and Q_R in the dtype of the arithmetic, None for a side without a factor."""
    left, right = (state[name].to(dtype) if name in state else None for name in ("Q_L", "Q_R"))
    return left, right


def _rotate(u: Tensor, bases: Bases, *, back: bool = False) -> Tensor:
    """`Q_L^T u Q_R`, or back, `Q_L u Q_R^T`."""
    left, right = bases
    if left is not None:
        u = bd.multiply(left, u, transpose=not back)
    return u if right is None else bd.multiply(right, u.mT, transpose=not back).mT


def _map(f: Any, S: Tensor) -> Tensor:
    """f of each block of a stored matrix, stored."""
    return bd.stored([f(block) for block in bd.blocks(S)], S.shape[-1])


def _follow(state: State, name: str, basis: str, dtype: torch.dtype) -> Tensor | None:
    """One power step of a side's basis; where each of its vectors came from, (..., n)."""
    if name not in state:
        return None
    bases, orders, first = [], [], 0
    for S, Q in zip(bd.blocks(state[name].to(dtype)), bd.blocks(state[basis].to(dtype)), strict=True):
        new, order = power_step(S, Q)
        starts = first + order.shape[-1] * torch.arange(order.shape[-2], device=order.device)
        bases.append(new)
        orders.append((order + starts[:, None]).flatten(-2))
        first += order.shape[-1] * order.shape[-2]
    state[basis] = bd.stored(bases, state[basis].shape[-1]).to(state[basis].dtype)
    return torch.cat(orders, dim=-1)


def _reorder(t: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Second moments (rows x columns, or means over one of them) in the new order of the basis vectors."""
    if left is not None and t.shape[-2] == left.shape[-1]:
        t = t.gather(-2, left[..., :, None].expand_as(t))
    if right is not None and t.shape[-1] == right.shape[-1]:
        t = t.gather(-1, right[..., None, :].expand_as(t))
    return t


def _rounded(x: Tensor, k: Context) -> Tensor:
    """bfloat16 by stochastic rounding."""
    count = math.prod(x.shape)
    noise = torch.empty(0, device=x.device)
    while noise.numel() < count:
        noise = torch.cat([noise, k.uniform().float().flatten()])
    bits = (noise[:count] * 65536).to(torch.int32).reshape(x.shape)
    return stochastic_bf16(x.float(), bits).to(torch.bfloat16)


__all__ = ["Form", "Sides", "rotated"]
