"""Grafting: the direction of one update with the length of another.

"Disentangling Adaptive Gradient Methods from Learning Rates" (arXiv 2002.11803): how far a rule moves and where to are two
things, and a preconditioner takes over the learning rate of the rule whose length it borrows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..transform import Context, Param, Slot, State

Graft = Literal["none", "sgd", "adam", "rmsprop", "adagrad"]


def with_norm_of(u: Tensor, like: Tensor, tiny: float = 1e-16) -> Tensor:
    """`u ||like|| / (||u|| + tiny)`, the norms those of each matrix, over the last two dimensions."""
    return u * (_norm(like) / (_norm(u) + tiny))


def _norm(u: Tensor) -> Tensor:
    return torch.linalg.vector_norm(u, dim=(-2, -1), keepdim=True)


@dataclass(frozen=True)
class Grafting:
    """The rule whose length is borrowed, with M the average of gradients and g the newest.

        none, sgd   M
        adam        M / (sqrt(v / (1 - b^t)) + eps),   v <- b v + (1 - b) g^2
        rmsprop     M / (sqrt(v) + eps)
        adagrad     M / (sqrt(v) + eps),               v <- v + g^2

    Where b is 1, v is a sum without correction. With "none" nothing is borrowed, but M is still what moves the weights before a
    preconditioner is there.

    Args:
        beta2: b, in [0, 1]; None takes the second of the group's `betas`.
        eps: added to the root.
    """

    kind: Graft
    beta2: float | None = None
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if self.kind not in get_args(Graft):
            raise ValueError(f"grafting={self.kind!r}: must be one of {', '.join(get_args(Graft))}")
        if self.beta2 is not None and not 0.0 <= self.beta2 <= 1.0:
            raise ValueError(f"grafting_beta2={self.beta2}: must be in [0, 1], or None")
        if not self.eps >= 0:
            raise ValueError(f"grafting_eps={self.eps}: must not be negative")

    @property
    def defaults(self) -> dict[str, Any]:
        return {"grafting_beta2": self.beta2, "grafting_eps": self.eps}

    @property
    def adaptive(self) -> bool:
        """Whether it keeps v."""
        return self.kind not in ("none", "sgd")

    def slots(self, p: Param) -> dict[str, Slot]:
        return {"grafting_sq": Slot(tuple(p.shape), kind="nonneg")} if self.adaptive else {}

    def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float]:
        b = hyper["grafting_beta2"]
        b = 1.0 if self.kind == "adagrad" else float(hyper["betas"][1] if b is None else b)
        corrected = self.kind == "adam" and b < 1.0
        return {
            "graft_keep": b,
            "graft_take": 1 - b if b < 1.0 else 1.0,
            "graft_debias": (1 - b**step) ** -0.5 if corrected else 1.0,
            "graft_eps": float(hyper["grafting_eps"]),
        }

    def step(self, M: Tensor, g: Tensor, state: State, k: Context) -> Tensor:
        """The borrowed rule's own step, before the learning rate; keeps v."""
        if not self.adaptive:
            return M
        v = state["grafting_sq"] = k.graft_keep * state["grafting_sq"] + k.graft_take * (g * g)
        return M / (v.sqrt() * k.graft_debias + k.graft_eps)


__all__ = ["Graft", "Grafting", "with_norm_of"]
