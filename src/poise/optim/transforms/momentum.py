"""Momentum: the update becomes a running sum, or average, of the updates before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from torch import Tensor

from ..transform import Context, Param, Slot, State, Transform
from .adaptive import check_betas

Start = Literal["zeros", "gradient"]


class momentum(Transform):
    """Heavy-ball or Nesterov momentum.

    `buf <- mu * buf + w * u`, and the result is `buf`, or with `nesterov` the look-ahead `w * u + mu * buf`.

    Args:
        momentum: `mu`, in [0, 1).
        nesterov: return the look-ahead.
        dampening: `w = 1 - dampening`, except that on the first step `w = 1` (torch.optim.SGD).
        average: `w = 1 - mu` on every step, so that the buffer is an exponential average (Muon); excludes `dampening`.
        start: where an average begins: at "zeros", or at the first "gradient", which it then is, whole.
        correct_bias: return `buf / (1 - mu^t)`, of an average that began at zero; only with `average`, not with `nesterov`.
    """

    def __init__(
        self,
        momentum: float = 0.9,
        nesterov: bool = False,
        dampening: float = 0.0,
        average: bool = False,
        start: Start = "zeros",
        correct_bias: bool = False,
    ) -> None:
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum={momentum}: must be in [0, 1)")
        if average and dampening:
            raise ValueError(f"dampening={dampening}: an average has no dampening; leave it at 0")
        if nesterov and dampening:
            raise ValueError(f"dampening={dampening}: Nesterov momentum needs dampening 0")
        if nesterov and momentum == 0.0 and not average:  # torch.optim.SGD refuses it, torch.optim.Muon does not
            raise ValueError("nesterov=True: needs a momentum above 0")
        if start not in get_args(Start):
            raise ValueError(f"start={start!r}: must be 'zeros' or 'gradient'")
        if start == "gradient" and not average:
            raise ValueError("start='gradient': is where an average begins; use it with average=True")
        if correct_bias and (nesterov or not average or start != "zeros"):
            raise ValueError("correct_bias=True: needs average=True, nesterov=False and start='zeros'")
        self.nesterov, self.average, self.start, self.correct_bias = nesterov, average, start, correct_bias
        self.defaults = {"momentum": momentum} if average else {"momentum": momentum, "dampening": dampening}

    def slots(self, p: Param) -> dict[str, Slot]:
        return {"momentum_buffer": Slot(tuple(p.shape))}

    def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float]:
        mu = float(hyper["momentum"])
        if self.correct_bias:
            return {"mu": mu, "weight": 1 - mu, "debias": 1 / (1 - mu**step)}
        if self.average:
            return {"mu": mu, "weight": 1.0 if step == 1 and self.start == "gradient" else 1 - mu}
        return {"mu": mu, "weight": 1.0 if step == 1 else 1 - float(hyper["dampening"])}

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        new = k.weight * u
        state["momentum_buffer"] = k.mu * state["momentum_buffer"] + new
        if self.correct_bias:
            return k.debias * state["momentum_buffer"]
        return new + k.mu * state["momentum_buffer"] if self.nesterov else state["momentum_buffer"]


class interpolated(Transform):
    """Lion's momentum: `c = b1 m + (1 - b1) u`, result c; then `m <- b2 m + (1 - b2) u`, with the other beta.

    Args:
        betas: `(b1, b2)`, each in [0, 1).
    """

    def __init__(self, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        check_betas(betas)
        self.defaults = {"betas": tuple(betas)}

    def slots(self, p: Param) -> dict[str, Slot]:
        return {"exp_avg": Slot(tuple(p.shape))}

    def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float]:
        b1, b2 = map(float, hyper["betas"])
        return {"b1": b1, "c1": 1 - b1, "b2": b2, "c2": 1 - b2}

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        m = state["exp_avg"]
        c = k.b1 * m + k.c1 * u
        state["exp_avg"] = k.b2 * m + k.c2 * u
        return c
