"""Adaptive braking: momentum that takes in less of a gradient that agrees with it, and more of one that opposes it."""

from __future__ import annotations

from typing import Literal, Unpack, get_args

import torch
from torch import Tensor

from poise.catalog import Paper, log_uniform, method, uniform

from ..optimizer import Optimizer
from ..options import Options
from ..routing import Params
from ..transform import Context, Param, Slot, State, Transform, chain
from ..transforms.adaptive import check_eps
from ..transforms.blocks import in_elements, outputs
from ..transforms.step import Decay

Per = Literal["tensor", "model", "filter"]


class _Velocity(Transform):
    """What all ways of braking share: `a = 1 - rho cos`, `v <- mu v + a u`, result v or the look-ahead `a u + mu v`."""

    reads = "update"

    def __init__(self, momentum: float = 0.9, rho: float = 2.0, nesterov: bool = False, eps: float = 1e-8) -> None:
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum={momentum}: must be in [0, 1)")
        if not rho >= 0.0:
            raise ValueError(f"rho={rho}: must not be negative")
        check_eps(eps)
        self.nesterov = nesterov
        self.defaults = {"momentum": momentum, "rho": rho, "eps": eps}

    def slots(self, p: Param) -> dict[str, Slot]:
        return {"momentum_buffer": Slot(tuple(p.shape))}

    def taken_in(self, u: Tensor, state: State, k: Context, cos: Tensor) -> Tensor:
        new = (1 - k.rho * cos) * u
        v = state["momentum_buffer"] = k.momentum * state["momentum_buffer"] + new
        return new + k.momentum * v if self.nesterov else v


class braked_momentum(_Velocity):
    """Heavy-ball momentum with adaptive braking, in the place of `momentum` in any chain.

        a = 1 - rho <u, v> / max(||u|| ||v||, eps);   v <- mu v + a u;   result v

    with v as it was before: an update along it is damped to 1 - rho, one against it amplified to 1 + rho, and the first passes
    as it is.

    Args:
        momentum: mu, in [0, 1).
        rho: 2, at least 0.
        per: "tensor" has one cosine for each parameter; "model" one over every parameter whose rule holds this very object.
            `filter_braked_momentum` has one for each output.
        nesterov: return `a u + mu v`.
        eps: 1e-8.
    """

    def __init__(
        self,
        momentum: float = 0.9,
        rho: float = 2.0,
        per: Literal["tensor", "model"] = "tensor",
        nesterov: bool = False,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(momentum, rho, nesterov, eps)
        if per not in ("tensor", "model"):
            raise ValueError(f"per={per!r}: must be 'tensor' or 'model'")
        self.per = per

    def measure(self, u: Tensor, state: State, x: Tensor, k: Context) -> dict[str, Tensor]:
        g, v = u.double(), state["momentum_buffer"].double()
        return {"dot": (g * v).sum(), "new": g.square().sum(), "old": v.square().sum()}

    def reduce(self, totals: dict[str, Tensor], shared: State, k: Context) -> dict[str, Tensor]:
        return {"cos": cosine(totals["dot"], totals["new"], totals["old"], k.eps)}

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        if self.per == "model":
            return self.taken_in(u, state, k, k.total["cos"])
        return self.taken_in(u, state, k, cosine(k.own["dot"], k.own["new"], k.own["old"], k.eps))


class filter_braked_momentum(_Velocity):
    """`braked_momentum` with one cosine for each output, a filter or a row of a matrix; for a vector, with one in all."""

    unit = "block"

    def blocks(self, p: Param) -> tuple[tuple[int, int], ...] | None:
        return in_elements(((outputs(p), 1),) if len(p.shape) > 1 else ((1, outputs(p)),), p)

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        v = state["momentum_buffer"]
        dot, new, old = ((a * b).sum(1, keepdim=True) for a, b in ((u, v), (u, u), (v, v)))
        return self.taken_in(u, state, k, cosine(dot, new, old, k.eps))


def cosine(dot: Tensor, new: Tensor, old: Tensor, eps: float) -> Tensor:
    """Of the angle between two vectors, from their product and their squared lengths."""
    return dot / torch.clamp(new.sqrt() * old.sqrt(), min=eps)  # roots first: the product of the squares overflows sooner


@method(
    "braked-sgd",
    family="optim",
    paper=Paper("Adaptive Braking for Mitigating Gradient Delay", arxiv="2007.01397", year=2020),
    tune={
        "lr": log_uniform(1e-3, 1.0),
        "momentum": uniform(0.0, 0.99),
        "rho": uniform(0.0, 3.0),
        "weight_decay": log_uniform(1e-6, 1e-1),
    },
    mutant=("(1 - k.rho * cos)", "(1 + k.rho * cos)"),
)
class BrakedSGD(Optimizer):
    """SGD with momentum that brakes, for gradients that come late: pipelines, asynchronous workers.

        a  = 1 - rho <g, v> / max(||g|| ||v||, eps)
        v <- momentum * v + a g
        x <- x - lr * ( v + weight_decay * x )

    A gradient along the velocity is damped, one against it amplified, so that oscillations which a delay feeds die out.

    Args:
        lr: 1e-3, as in torch.optim.SGD.
        momentum: 0.9.
        rho: 2. Gradients are scaled by 1 - rho to 1 + rho; 0 is SGD with momentum. At 1 it nearly stalls where gradients stay
            parallel to the velocity, since a is 0 there.
        weight_decay: 0; decoupled, so that it is not braked.
        per: what has one cosine: "tensor" each parameter, "model" all together, "filter" each output (row, filter).
        nesterov: a g + momentum * v takes the place of v in the step.
        eps: 1e-8.
        options: see `Optimizer`.

    State: 1 value per element. Source: "Adaptive Braking for Mitigating Gradient Delay" (arXiv 2007.01397). No code of the
    authors was found; nesterov and where the decay acts are ours.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        rho: float = 2.0,
        weight_decay: float = 0.0,
        *,
        per: Per = "tensor",
        nesterov: bool = False,
        eps: float = 1e-8,
        decay: Decay = "coupled",
        **options: Unpack[Options],
    ) -> None:
        if per not in get_args(Per):
            raise ValueError(f"per={per!r}: must be one of {', '.join(get_args(Per))}")
        if per == "filter":
            rule = filter_braked_momentum(momentum, rho, nesterov, eps)
        else:
            rule = braked_momentum(momentum, rho, per, nesterov, eps)
        super().__init__(params, chain(rule), lr, weight_decay, decay, **options)
