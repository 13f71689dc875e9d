"""Rules whose state goes round: some tensors have it for a while, then others."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from poise.memory.rounding import key_of, uniform

from ..transform import Context, Param, State, Transform
from .subspace import Residual, check_gap, check_residual, scale_defaults, without_state

Order = Literal["random", "ascending", "descending", "mirror"]


class in_turn(Transform):
    """A rule driven on some whole tensors, in turn; a rule without state on the others.

        u <- proj_scale rule(u)                         for the tensors whose turn it is
        u <- proj_scale inactive_scale f(u)             for the others, f as of `projected`

    A turn lasts `update_gap` steps, and begins with no memory of earlier ones: neither state nor count of steps. Of the N
    parameters of this rule, in the order of the groups, round(density N) have a turn at once, and at least one:

    - "random": any of them, drawn anew for every turn.
    - "ascending", "descending": the next ones from the first on, or from the last one backwards, round and round.
    - "mirror": the next pairs of one from the front and one from the back, so many that their number is the nearest even one.
      Of an odd N the one in the middle never has a turn.

    Turns are counted by each parameter's own steps. With one that has no gradient in some steps, its turns shift.

    Args:
        inner: the rule, whose state must begin as a number.
        density: in (0, 1].
        update_gap: steps of a turn.
        order: see above.
        residual, proj_scale, inactive_scale: f and the factors.
        seed: of "random".

    State: the inner rule's, of the tensors whose turn it is; that of the others rests, and takes no memory (`Transform.rests`).

    Raises:
        ValueError: for a setting that is none of these.

    Source: "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead" (arXiv 2411.07837).
    """

    unit = "tensor"
    rests = True

    def __init__(
        self,
        inner: Transform,
        density: float = 0.25,
        update_gap: int = 200,
        order: Order = "random",
        residual: Residual = "sign",
        proj_scale: float = 1.0,
        inactive_scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        check_gap(update_gap, "update_gap")
        check_residual(residual)
        if not 0.0 < density <= 1.0:
            raise ValueError(f"density={density}: must be in (0, 1]")
        if order not in get_args(Order):
            raise ValueError(f"order={order!r}: must be one of {', '.join(map(repr, get_args(Order)))}")
        self.inner, self.every, self.blind = (inner,), update_gap, inner.blind
        self.density, self.order, self.seed = density, order, seed
        self.residual: Residual = residual
        self.defaults = scale_defaults(proj_scale, inactive_scale, residual)

    def turn(self, number: int, count: int) -> set[int]:
        """Which of `count` parameters have turn `number`, counted from 0."""
        if self.order == "mirror" and count > 1:
            half = count // 2
            pairs = min(max(round(self.density * count / 2), 1), half)
            front = {(number * pairs + i) % half for i in range(pairs)}
            return front | {count - 1 - i for i in front}
        at_once = max(round(self.density * count), 1)
        if self.order == "random":
            drawn = uniform(key_of(self.seed, "turn", number), torch.arange(count, dtype=torch.int32))
            return set(drawn.argsort(stable=True)[:at_once].tolist())
        first = number * at_once
        if self.order == "ascending":
            return {(first + i) % count for i in range(at_once)}
        return {(count - 1 - first - i) % count for i in range(at_once)}

    def has_turn(self, k: Context) -> bool:
        """Whether it is this parameter's turn."""
        return k.param.index in self.turn((k.step - 1) // self.every, k.param.count)

    def inner_step(self, step: int) -> int:
        return (step - 1) % self.every + 1

    def refresh(self, u: Tensor, state: State, x: Tensor, k: Context) -> None:
        k.inner[0].rest()

    def enter(self, u: Tensor, state: State, x: Tensor, k: Context) -> tuple[Tensor | None, ...]:
        return (u if self.has_turn(k) else None,)

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        if self.has_turn(k):
            return k.proj_scale * k.inner[0].apply(u)
        if self.residual == "none":
            return torch.zeros_like(u)
        return k.proj_scale * k.inactive_scale * without_state(self.residual, u)

    def update_rms(self, p: Param) -> float | None:
        inside = self.inner[0].update_rms(p)
        return None if inside is None else self.defaults["proj_scale"] * inside  # of the tensors whose turn it is

    def __repr__(self) -> str:
        return f"in_turn({self.inner[0]!r}, {self.density}, {self.every}, order={self.order!r}, residual={self.residual!r})"


__all__ = ["Order", "in_turn"]
