"""The optimisers of the induced metric: an update divided by one plus the squared length of the gradient."""

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
from ..transforms.momentum import momentum as momentum_link
from ..transforms.step import Decay

Length = Literal["gradient", "update"]
Variant = Literal["plain", "log", "rms"]


class induced_metric(Transform):
    """The update divided by one plus the squared length of the gradient: smooth clipping, of all parameters together.

        s = xi <g, D^-1 g>, summed over every parameter whose rule holds this very object
        E <- beta E + (1 - beta) s
        u <- u / (1 + E / (1 - beta^t))

    With beta = 0 and `u = D^-1 g` that is `(D + xi g g^T)^-1 g`: the gradient in the metric that the graph of the loss has, its
    height stretched by sqrt(xi), over a space with metric D.

    Args:
        xi: 0.1, at least 0; useful values go as one over (number of parameters * mean g^2). It may differ between groups.
        beta: 0.8, in [0, 1).
        length: "update" for a link right after a positive preconditioner, `u = D^-1 g`: s is `xi <g, u>`. Where momentum makes
            that negative it counts as 0. "gradient" takes D = I whatever u is.
        log: the metric of the logarithm of the loss: the factor is `L / (L^2 + E / (1 - beta^t))`. step() then needs a closure
            that returns L > 0, on several ranks the mean over all of them.

    Raises:
        ValueError: in a step, for a loss that is not positive; nothing was changed then.

    State: 2 numbers in all, E and `1 - beta^t`.
    """

    def __init__(self, xi: float = 0.1, beta: float = 0.8, length: Length = "update", log: bool = False) -> None:
        if not xi >= 0.0:
            raise ValueError(f"xi={xi}: must not be negative")
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"beta={beta}: must be in [0, 1)")
        if length not in get_args(Length):
            raise ValueError(f"length={length!r}: must be one of {', '.join(get_args(Length))}")
        self.reads = "grad" if length == "gradient" else "update"
        self.log = self.needs_loss = log
        self.defaults: Mapping[str, Any] = {"xi": xi, "beta": beta}

    def slots(self, p: Param) -> dict[str, Slot]:
        one = Slot((), dtype=torch.float64, kind="exact", shared=True)
        return {"metric": one, "metric_weight": one}

    def measure(self, u: Tensor, state: State, x: Tensor, k: Context) -> dict[str, Tensor]:
        return {"length": k.xi * (k.grad.double() * u.double()).sum()}

    def reduce(self, totals: dict[str, Tensor], shared: State, k: Context) -> dict[str, Tensor]:
        L = torch.ones_like(totals["length"])
        if self.log and k.loss is not None:  # never None in a step: needs_loss
            L = k.loss.to(L)
            if not float(L) > 0:
                raise ValueError(f"{self!r}: the loss must be positive, got {float(L)}")
        shared["metric"] = k.beta * shared["metric"] + (1 - k.beta) * totals["length"].clamp(min=0.0)
        shared["metric_weight"] = k.beta * shared["metric_weight"] + (1 - k.beta)
        E = shared["metric"] / shared["metric_weight"]
        return {"factor": L / (L * L + E)}

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return u * k.total["factor"]


class rms_induced_metric(induced_metric):
    """RMSprop's direction and `induced_metric` in its metric, `D = sqrt(r / (1 - b_r^t)) + eps`.

    `r <- b_r r + (1 - b_r) g^2` of the raw gradient; u, which may carry momentum, becomes `D^-1 u` and is divided as there, by
    one plus the average of `xi <g, D^-1 g>`.

    Args:
        xi, beta: as there. beta_rms: `b_r`, in [0, 1). eps: added to the root after bias correction.
    """

    def __init__(self, xi: float = 0.1, beta: float = 0.8, beta_rms: float = 0.99, eps: float = 1e-8) -> None:
        super().__init__(xi, beta, "gradient")
        if not 0.0 <= beta_rms < 1.0:
            raise ValueError(f"beta_rms={beta_rms}: must be in [0, 1)")
        check_eps(eps)
        self.defaults = {**self.defaults, "beta_rms": beta_rms, "eps": eps}

    def slots(self, p: Param) -> dict[str, Slot]:
        return {"exp_avg_sq": Slot(tuple(p.shape), kind="nonneg"), **super().slots(p)}

    def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float]:
        b = float(hyper["beta_rms"])
        known = {name: float(hyper[name]) for name in ("xi", "beta", "eps")}
        return {**known, "b": b, "c": 1 - b, "debias": (1 - b**step) ** -0.5}

    def measure(self, u: Tensor, state: State, x: Tensor, k: Context) -> dict[str, Tensor]:
        state["exp_avg_sq"] = k.b * state["exp_avg_sq"] + k.c * (u * u)
        return super().measure(u / self._D(state, k), state, x, k)

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return super().update(u / self._D(state, k), state, x, k)

    def _D(self, state: State, k: Context) -> Tensor:
        return state["exp_avg_sq"].sqrt() * k.debias + k.eps


@method(
    "induced-metric",
    family="optim",
    paper=Paper("The Optimiser Hidden in Plain Sight", arxiv="2509.03594", year=2025),
    tune={"lr": log_uniform(1e-3, 3.0), "xi": log_uniform(1e-8, 10.0), "weight_decay": log_uniform(1e-6, 1e-1)},
    mutant=("correct_bias=True", "correct_bias=False"),
)
class InducedMetric(Optimizer):
    """Momentum divided by one plus the gradient's squared length: a smooth clip by global norm.

        s = xi * sum over all parameters of g^2;   E <- beta E + (1 - beta) s;   m <- mu m + (1 - mu) g
        x <- x - lr * ( m / (1 - mu^t) * factor + weight_decay * x )

    | variant | factor, with `Ê = E / (1 - beta^t)`                                                               |
    |---------|-----------------------------------------------------------------------------------------------------|
    | `plain` | `1 / (1 + Ê)`: SGD in the metric `I + xi g g^T`; without averages a step is at most lr / (2 sqrt(xi)) |
    | `log`   | `L / (L^2 + Ê)`, of the loss L > 0: step() needs a closure that returns it                          |
    | `rms`   | `1 / (D (1 + Ê))`, `D = sqrt(r / (1 - b_r^t)) + eps`, r an average of g^2; s sums `xi g^2 / D`      |

    Args:
        lr: 0.1, the release's for all variants; for "rms", whose direction is Adam's, 1e-3 is of the usual size.
        momentum: mu, 0.9.
        xi: 0.1, the release's. Its tuned values lie between 1e-8 and 2e-2, falling as 1 / (number of parameters * mean g^2); 0
            leaves SGD with an average for momentum, and of "rms" Adam.
        beta: 0.8.
        weight_decay: 0.
        variant: see above.
        beta_rms, eps: `b_r` and eps of "rms": 0.99, 1e-8.
        options: see `Optimizer`.

    State: 1 value per element, of "rms" 2, and two numbers. Source: "The Optimiser Hidden in Plain Sight" (arXiv 2509.03594)
    and its release. One statistic for all parameters, where the release means to keep one for each group and keeps only the
    first's; and parameters without gradient do not count their steps.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 0.1,
        momentum: float = 0.9,
        xi: float = 0.1,
        beta: float = 0.8,
        weight_decay: float = 0.0,
        *,
        variant: Variant = "plain",
        beta_rms: float = 0.99,
        eps: float = 1e-8,
        decay: Decay = "coupled",
        **options: Unpack[Options],
    ) -> None:
        if variant not in get_args(Variant):
            raise ValueError(f"variant={variant!r}: must be one of {', '.join(get_args(Variant))}")
        if variant == "rms":
            link = rms_induced_metric(xi, beta, beta_rms, eps)
        else:
            link = induced_metric(xi, beta, "gradient", log=variant == "log")
        rule = chain(momentum_link(momentum, average=True, correct_bias=True), link)
        super().__init__(params, rule, lr, weight_decay, decay, **options)
