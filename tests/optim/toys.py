"""Small rules that show one part of the protocol each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from conformance.problems import leaves, play
from torch import Tensor

from poise.optim import Context, Optimizer, Param, Slot, Transform
from poise.optim.transform import State


def optimizer(params: Any, rule: Any, **options: Any) -> Optimizer:
    """Run eagerly: what the protocol means does not depend on it, and engine/test_backends.py shows that all backends agree."""
    settings: dict[str, Any] = {"backend": "eager", **options}
    return Optimizer(params, rule, **settings)


class gain(Transform):
    """`u <- gain * u`: the shortest link with a hyper-parameter."""

    def __init__(self, gain: float = 2.0) -> None:
        self.defaults = {"gain": gain}

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return k.gain * u


class heavy(Transform):
    """`buffer <- 0.5 buffer + u`: the shortest link with state."""

    def slots(self, p: Param) -> dict[str, Slot]:
        return {"buffer": Slot(tuple(p.shape))}

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        state["buffer"] = 0.5 * state["buffer"] + u
        return state["buffer"]


class apply(Transform):
    """`u <- f(u, state, x, k)`, with slots (a number: of the parameter's shape, beginning there) and attributes as asked."""

    def __init__(
        self,
        f: Callable[[Tensor, State, Tensor, Context], Tensor] = lambda u, state, x, k: u,
        slots: Mapping[str, float | Slot] | None = None,
        **attributes: Any,
    ) -> None:
        self.f, self.kept = f, dict(slots or {})
        for name, value in attributes.items():
            setattr(self, name, value)

    def slots(self, p: Param) -> dict[str, Slot]:
        return {name: s if isinstance(s, Slot) else Slot(tuple(p.shape), init=s) for name, s in self.kept.items()}

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return self.f(u, state, x, k)


class apply_matrix(apply):
    """The same for matrices."""

    unit = "matrix"


class apply_tensor(apply):
    """The same for whole tensors."""

    unit = "tensor"


class apply_layer(apply):
    """The same for layers."""

    unit = "layer"


def zeros(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
    """Parameters of zeros: after one step at lr 1 they are minus the update."""
    return leaves([torch.zeros(shape, dtype=dtype) for shape in shapes])


def update_of(rule: Any, *grads: Tensor, **options: Any) -> list[Tensor]:
    """The updates that a fresh optimizer over `rule` gives these gradients, for weights of zero."""
    params = zeros(*[tuple(g.shape) for g in grads], dtype=grads[0].dtype)
    return [-w for w in play(optimizer(params, rule, **{"lr": 1.0, **options}), params, [list(grads)])]


def numbers(*values: float) -> Tensor:
    """A float64 vector."""
    return torch.tensor(values, dtype=torch.float64)


def ramp(*shape: int) -> Tensor:
    """1, 2, 3, ... in this shape, float64."""
    return torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64).reshape(shape)
