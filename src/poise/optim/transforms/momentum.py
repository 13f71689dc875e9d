"""Momentum: the update becomes a running sum, or average, of the updates before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..transform import Context, Param, Slot, State, Transform


class momentum(Transform):
    """Heavy-ball or Nesterov momentum.

    `buf <- mu * buf + w * u`, and the result is `buf`, or with `nesterov` the look-ahead `w * u + mu * buf`.

    Args:
        momentum: `mu`, in [0, 1).
        nesterov: return the look-ahead.
        dampening: `w = 1 - dampening`, except that on the first step `w = 1` (torch.optim.SGD).
        average: `w = 1 - mu` on every step, so that the buffer is an exponential average (Muon); excludes `dampening`.
    """

    def __init__(self, momentum: float = 0.9, nesterov: bool = False, dampening: float = 0.0, average: bool = False) -> None:
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum={momentum}: must be in [0, 1)")
        if average and dampening:
            raise ValueError(f"dampening={dampening}: an average has no dampening; leave it at 0")
        if nesterov and dampening:
            raise ValueError(f"dampening={dampening}: Nesterov momentum needs dampening 0")
        if nesterov and momentum == 0.0 and not average:  # torch.optim.SGD refuses it, torch.optim.Muon does not
            raise ValueError("nesterov=True: needs a momentum above 0")
        self.nesterov, self.average = nesterov, average
        self.defaults = {"momentum": momentum} if average else {"momentum": momentum, "dampening": dampening}

    def slots(self, p: Param) -> dict[str, Slot]:
        return {"momentum_buffer": Slot(tuple(p.shape))}

    def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float]:
        mu = float(hyper["momentum"])
        if self.average:
            return {"mu": mu, "weight": 1 - mu}
        return {"mu": mu, "weight": 1.0 if step == 1 else 1 - float(hyper["dampening"])}

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        new = k.weight * u
        state["momentum_buffer"] = k.mu * state["momentum_buffer"] + new
        return new + k.mu * state["momentum_buffer"] if self.nesterov else state["momentum_buffer"]
