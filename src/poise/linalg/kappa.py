"""Even convex functions whose gradients turn a momentum into a step: value, gradient, conjugate.

A step along the gradient of kappa with decoupled decay lam solves `min f(x) + kappa*(lam x) / lam`, kappa* being the conjugate
`kappa*(y) = max over x of <x, y> - kappa(x)`. Where kappa is a norm, its gradient is the best point of the dual norm's unit
ball, and its conjugate is 0 in that ball and infinite outside: a constraint. With smooth ones the constraint is a wall that
rises before it is reached.

Of the sums over entries, `delta` is the width:

| kappa        | kappa(x)                                      | gradient               | kappa*(y)                       |
|--------------|-----------------------------------------------|------------------------|---------------------------------|
| a norm       | `||x||`, any of `norms`                       | lmo of the dual norm   | 0 where the dual norm is <= 1   |
| `squared_l2` | `x^2 / 2`                                     | x                      | `y^2 / 2`                       |
| `huber`      | `x^2 / 2 delta`, beyond delta `|x| - delta/2` | `clip(x/delta, -1, 1)` | `delta y^2 / 2`                 |
| `softsign`   | `|x| - delta log(1 + |x| / delta)`            | `x / (delta + |x|)`    | `-delta (|y| + log(1 - |y|))`   |
| `logcosh`    | `delta log cosh(x / delta)`                   | `tanh(x / delta)`      | delta times the entropy below   |
| `top_k`      | the k largest absolute entries                | their signs, 0 beside  | 0 where `|y| <= 1`, sum `<= k`  |

The entropy is `((1 + y) log(1 + y) + (1 - y) log(1 - y)) / 2`. `huber`, `softsign` and `logcosh` have an infinite conjugate
where an entry of y is beyond 1, and approach `l1`, whose gradient is the sign, as delta goes to 0.

Source: "Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts" (arXiv 2310.05898).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import norms, polar

ENTRIES = ("squared_l2", "huber", "softsign", "logcosh")  # and "l1": each entry by itself
KAPPAS = (*norms.NORMS, *ENTRIES, "top_k")

Function = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Kappa:
    """One kappa over the last two dimensions, as a function of matrices in float32 or float64.

    Args:
        name: one of `KAPPAS`.
        delta: width of `huber`, `softsign` and `logcosh`, in units of a gradient's entries; positive.
        top: k of `top_k` as a share of the entries, in (0, 1]; at least one entry counts.
        method, steps: of the polar factor, which is the gradient of `nuclear`; see `poise.linalg.polar.orthogonalize`.

    Raises:
        ValueError: for anything else.
    """

    name: str
    delta: float = 1e-3
    top: float = 0.1
    method: str = "polar_express"
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.name not in KAPPAS:
            raise ValueError(f"kappa={self.name!r}: unknown; known: {', '.join(KAPPAS)}")
        if not 0.0 < self.delta < math.inf:
            raise ValueError(f"delta={self.delta}: must be positive and finite")
        if not 0.0 < self.top <= 1.0:
            raise ValueError(f"top={self.top}: a share in (0, 1] is needed")
        polar.check_options(self.method, self.steps, "auto", None)

    @property
    def norm(self) -> bool:
        """Whether it is a norm."""
        return self.name in norms.NORMS

    def value(self, x: Tensor) -> Tensor:
        """kappa(x), shape (...) for x (..., rows, columns)."""
        if self.norm:
            return norms.value(x, self.name)
        if self.name == "top_k":
            return x.abs().flatten(-2).topk(self.count(x)).values.sum(-1)
        return VALUES[self.name](x, self.delta).sum((-2, -1))

    def gradient(self, x: Tensor) -> Tensor:
        """The gradient, and 0 at x = 0; where there are several, the one of `norms.lmo`."""
        if self.norm:
            return norms.lmo(x, norms.NORMS[self.name].dual, self.method, steps=self.steps)
        if self.name == "top_k":
            flat = x.flatten(-2)
            places = flat.abs().topk(self.count(x)).indices
            return torch.zeros_like(flat).scatter(-1, places, flat.sign().gather(-1, places)).unflatten(-1, x.shape[-2:])
        return GRADIENTS[self.name](x, self.delta)

    def conjugate(self, y: Tensor) -> Tensor:
        """kappa*(y), shape (...); infinite outside of its domain, up to rounding."""
        if self.norm:
            return _wall(norms.dual(y, self.name), 1.0)
        if self.name == "top_k":
            return _wall(norms.value(y, "linf"), 1.0) + _wall(norms.value(y, "l1"), float(self.count(y)))
        return CONJUGATES[self.name](y, self.delta).sum((-2, -1))

    def count(self, x: Tensor) -> int:
        """k of `top_k`."""
        entries = x.shape[-2] * x.shape[-1]
        return min(entries, max(1, math.ceil(self.top * entries)))


def _wall(size: Tensor, limit: float) -> Tensor:
    """0 up to `limit`, infinite beyond. Weights rest on the wall, so rounding must not put them behind it."""
    return torch.where(size <= limit * (1 + 64 * torch.finfo(size.dtype).eps), 0.0, torch.inf)


def _inside(y: Tensor, inner: Tensor) -> Tensor:
    """`inner` where |y| <= 1, infinite elsewhere."""
    return torch.where(y.abs() <= 1, inner, torch.inf)


def _logcosh(x: Tensor, delta: float) -> Tensor:
    z = (x / delta).abs()
    return delta * (z + torch.log1p(torch.exp(-2 * z)) - math.log(2.0))


def _entropy(y: Tensor, delta: float) -> Tensor:
    p, q = 1 + y, 1 - y
    return _inside(y, delta / 2 * (torch.special.xlogy(p, p) + torch.special.xlogy(q, q)))


VALUES: dict[str, Function] = {
    "squared_l2": lambda x, delta: x.square() / 2,
    "huber": lambda x, delta: torch.where(x.abs() <= delta, x.square() / (2 * delta), x.abs() - delta / 2),
    "softsign": lambda x, delta: x.abs() - delta * torch.log1p(x.abs() / delta),
    "logcosh": _logcosh,
}
GRADIENTS: dict[str, Function] = {
    "squared_l2": lambda x, delta: x,
    "huber": lambda x, delta: (x / delta).clamp(-1.0, 1.0),
    "softsign": lambda x, delta: x / (delta + x.abs()),
    "logcosh": lambda x, delta: torch.tanh(x / delta),
}
CONJUGATES: dict[str, Function] = {
    "squared_l2": lambda y, delta: y.square() / 2,
    "huber": lambda y, delta: _inside(y, delta / 2 * y.square()),
    "softsign": lambda y, delta: _inside(y, -delta * (y.abs() + torch.log1p(-y.abs()))),
    "logcosh": _entropy,
}

__all__ = ["ENTRIES", "KAPPAS", "Kappa"]
