"""Adaptive-memory momentum: how much of the past to keep, chosen in each step from two planes under the loss. Experimental."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Unpack, get_args

import torch
from torch import Tensor

from poise.catalog import Paper, log_uniform, method

from ..optimizer import Optimizer
from ..options import Options
from ..routing import Params
from ..transform import Context, Param, Slot, State, Transform, chain
from ..transforms.adaptive import check_eps
from ..transforms.step import Decay

Anchor = Literal["previous", "current", "loss"]


class adaptive_memory(Transform):
    """Momentum whose coefficient is chosen in each step, from a model of the loss with two planes. Experimental.

    One plane touches the loss at x_t, with value f and slope g; the other is what memory holds of it, with value c at x_t and
    slope d. The step minimizes the higher of the two, held near x_t and, by lam, near one more step along d:

        beta = clip_[0, 1]( [ (1 + lam) (c - f) / lr + <g - d, g + lam d> ] / ||g - d||^2 )
        d   <- ( (beta + lam) d + (1 - beta) g ) / (1 + lam),   result d;   d begins as the first g

    Products are sums over everything that shares a beta, each parameter's part times its group's lr.

    Args:
        lam: 9. `lam / (1 + lam)` is the least weight that the past keeps: 0.9.
        anchor: what c is. "previous": the plane goes through the iterate before, at the height that f and g foretell there:
            `c - f = lr <g - d, d>`. "current": `c = f`. "loss": at the height that was measured there,
            `c - f = f_before - f - lr ||d||^2`; step() then needs a closure that returns the loss.
        per: "model": one beta for every parameter whose rule holds this very object; "tensor": one for each.
        beta: a number fixes it, which leaves an exponential average.
    """

    reads = "update"

    def __init__(
        self,
        lam: float = 9.0,
        anchor: Anchor = "previous",
        per: Literal["model", "tensor"] = "model",
        beta: float | None = None,
    ) -> None:
        if not lam >= 0.0:
            raise ValueError(f"lam={lam}: must not be negative")
        if anchor not in get_args(Anchor):
            raise ValueError(f"anchor={anchor!r}: must be one of {', '.join(get_args(Anchor))}")
        if per not in ("model", "tensor"):
            raise ValueError(f"per={per!r}: must be 'model' or 'tensor'")
        if per == "tensor" and anchor == "loss":
            raise ValueError("per='tensor': a loss has no parts for each tensor; use anchor='previous' or 'current'")
        if beta is not None and not 0.0 <= beta <= 1.0:
            raise ValueError(f"beta={beta}: must be in [0, 1], or None")
        self.anchor, self.per, self.fixed = anchor, per, beta is not None
        self.needs_loss = anchor == "loss" and not self.fixed
        self.defaults: Mapping[str, Any] = {"lam": lam, **({"beta": beta} if self.fixed else {})}

    def slots(self, p: Param) -> dict[str, Slot]:
        kept = {"momentum_buffer": Slot(tuple(p.shape))}
        return kept | {"loss": Slot((), dtype=torch.float64, kind="exact", shared=True)} if self.needs_loss else kept

    def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float]:
        known = {"lam": float(hyper["lam"]), "lr": float(hyper["lr"]), "begins": float(step == 1)}
        return known | {"beta": float(hyper["beta"])} if self.fixed else known

    def measure(self, u: Tensor, state: State, x: Tensor, k: Context) -> dict[str, Tensor]:
        return self.products(u, state, k)

    def products(self, u: Tensor, state: State, k: Context, scale: Tensor | None = None) -> dict[str, Tensor]:
        """The sums that beta is made of; `scale` is what the step multiplies d with, beside lr."""
        g = u.double()
        d = state["momentum_buffer"].double() + k.begins * g
        gap = g - d
        weighed = gap if scale is None else scale * gap
        products = {"gap": weighed * gap, "gap_g": weighed * g, "gap_d": weighed * d}
        if self.needs_loss:
            products["memory"] = d * d if scale is None else scale * d * d
        return {name: k.lr * product.sum() for name, product in products.items()}

    def reduce(self, totals: dict[str, Tensor], shared: State, k: Context) -> dict[str, Tensor]:
        above = torch.zeros_like(totals["gap"])
        if self.needs_loss:
            assert k.loss is not None
            f = k.loss.to(above)
            above = shared["loss"] - f - totals["memory"]
            shared["loss"] = f
        return {"beta": self.beta(totals, above, k.lam)}

    def beta(self, sums: Mapping[str, Tensor], above: Tensor | float, lam: float | Tensor) -> Tensor:
        """Where the dual of the model is highest, between 0 and 1. `above` is c - f if it was measured, else 0."""
        if self.anchor == "previous":
            above = sums["gap_d"]
        best = (1 + lam) * above + sums["gap_g"] + lam * sums["gap_d"]
        differ = sums["gap"] > 0  # else g = d, and every beta gives the same
        return torch.where(differ, (best / torch.where(differ, sums["gap"], 1.0)).clamp(0.0, 1.0), 1.0)

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        if self.fixed:
            beta = k.beta
        else:
            beta = k.total["beta"] if self.per == "model" else self.beta(k.own, 0.0, k.lam)
        kept, taken = (beta + k.lam) / (1 + k.lam), (1 - beta) / (1 + k.lam)
        taken = k.begins + (1 - k.begins) * taken  # the first gradient whole
        d = state["momentum_buffer"] = kept * state["momentum_buffer"] + taken * u
        return d


class adaptive_memory_adam(adaptive_memory):
    """`adaptive_memory` in Adam's metric: `v <- b2 v + (1 - b2) u^2`, result `d / (sqrt(v / (1 - b2^t)) + eps)`.

    Products have 1 / (sqrt(v / (1 - b2^t)) + eps) as a further weight. Experimental.

    Args:
        beta2: `b2`, 0.999. eps: 1e-8. The others are those of `adaptive_memory`.
    """

    def __init__(
        self,
        lam: float = 9.0,
        anchor: Anchor = "previous",
        per: Literal["model", "tensor"] = "model",
        beta: float | None = None,
        beta2: float = 0.999,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(lam, anchor, per, beta)
        if not 0.0 <= beta2 < 1.0:
            raise ValueError(f"beta2={beta2}: must be in [0, 1)")
        check_eps(eps)
        self.defaults = {**self.defaults, "beta2": beta2, "eps": eps}

    def slots(self, p: Param) -> dict[str, Slot]:
        return {**super().slots(p), "exp_avg_sq": Slot(tuple(p.shape), kind="nonneg")}

    def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float]:
        b2 = float(hyper["beta2"])
        more = {"b2": b2, "c2": 1 - b2, "debias2": (1 - b2**step) ** -0.5, "eps": float(hyper["eps"])}
        return {**super().scalars(step, hyper), **more}

    def measure(self, u: Tensor, state: State, x: Tensor, k: Context) -> dict[str, Tensor]:
        state["exp_avg_sq"] = k.b2 * state["exp_avg_sq"] + k.c2 * (u * u)
        return self.products(u, state, k, self._scale(state, k).double())

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return super().update(u, state, x, k) * self._scale(state, k)

    def update_rms(self, p: Param) -> float:
        return 0.2  # as adam's

    def _scale(self, state: State, k: Context) -> Tensor:
        return 1 / (state["exp_avg_sq"].sqrt() * k.debias2 + k.eps)


@method(
    "experimental-adaptive-memory",
    family="optim",
    paper=Paper(
        "Adaptive Memory Momentum via a Model-Based Framework for Deep Learning Optimization", arxiv="2510.04988", year=2025
    ),
    tune={"lr": log_uniform(1e-3, 3.0), "lam": log_uniform(0.5, 50.0), "weight_decay": log_uniform(1e-6, 1e-1)},
    mutant=('above = sums["gap_d"]', 'above = sums["gap_g"]'),
)
class ExperimentalAdaptiveMemory(Optimizer):
    """SGD or AdamW whose momentum coefficient is chosen in each step. Experimental: parts of the paper were not to be had.

        beta = clip_[0, 1]( [ (1 + lam) (c - f) / lr + <g - d, g + lam d> ] / ||g - d||^2 )
        d   <- ( (beta + lam) d + (1 - beta) g ) / (1 + lam)
        x   <- x - lr * ( d + weight_decay * x )                                                 base="sgd"
        x   <- x - lr * ( d / (sqrt(v / (1 - b2^t)) + eps) + weight_decay * x )                  base="adamw"

    with v as in Adam, whose root also divides every term of the products under "adamw". `adaptive_memory` tells what c - f, the
    height of the memory's plane over that of the gradient, is under each anchor.

    Args:
        lr: 1e-3.
        weight_decay: 0, decoupled.
        base: "sgd" or "adamw".
        lam: 9, ours. Between 1 / (1 + lam) of the gradient and none is taken in, so the past keeps at least 0.9.
        anchor: "previous", ours: on a quadratic it stays stable at steps as large as fixed momentum 0.9 does, "current" only
            below 2 / curvature. "loss" needs a closure that returns the loss, of the same data as before to mean anything.
        per: "model": one beta for all parameters; "tensor": one for each.
        beta: a number fixes it.
        beta2, eps: `b2` and eps under "adamw": 0.999, 1e-8.
        options: see `Optimizer`.

    State: 1 value per element, under "adamw" 2. Source: "Adaptive Memory Momentum via a Model-Based Framework for Deep Learning
    Optimization" (arXiv 2510.04988): the model, the direction and the clip are the paper's; what it takes for c, lam and
    whether it has one beta for each layer could not be confirmed, and no code was found. Groups with different lr weigh in the
    products by it, as follows from the model.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        *,
        base: Literal["sgd", "adamw"] = "sgd",
        lam: float = 9.0,
        anchor: Anchor = "previous",
        per: Literal["model", "tensor"] = "model",
        beta: float | None = None,
        beta2: float = 0.999,
        eps: float = 1e-8,
        decay: Decay = "coupled",
        **options: Unpack[Options],
    ) -> None:
        if base not in ("sgd", "adamw"):
            raise ValueError(f"base={base!r}: must be 'sgd' or 'adamw'")
        rule = adaptive_memory(lam, anchor, per, beta)
        if base == "adamw":
            rule = adaptive_memory_adam(lam, anchor, per, beta, beta2, eps)
        super().__init__(params, chain(rule), lr, weight_decay, decay, **options)
