"""The non-Euclidean trust-region method: steps of fixed length in a norm of your choice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from torch import Tensor

from poise.catalog import Paper, log_uniform, method

from ..optimizer import Optimizer
from ..options import Options, check_rate
from ..routing import Params, Route, everything, hidden_matrices
from ..transform import Chain, Context, Param, Slot, State, Transform, chain
from ..transforms.lmo import MATRIX_NORMS, check_lmo, lmo
from ..transforms.momentum import Start
from ..transforms.momentum import momentum as momentum_link
from ..transforms.step import Decay


class extrapolated(Transform):
    """The step, and on from it to the point where the next gradient is taken.

    `z <- z - lr * (u + weight_decay * z)`, and the weights become `z + mu / (1 - mu) * (z - z_before)`, mu being momentum.
    """

    owns_step = True

    def slots(self, p: Param) -> dict[str, Slot]:
        return {"iterate": Slot(tuple(p.shape), init="param", kind="exact")}

    def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float]:
        lr, mu = float(hyper["lr"]), float(hyper["momentum"])
        return {
            "step_size": lr * float(hyper.get("update_scale", 1.0)),
            "shrink": lr * float(hyper["weight_decay"]),
            "ahead": mu / (1 - mu),
        }

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        before = state["iterate"]
        step = -k.step_size * u - k.shrink * before
        state["iterate"] = before + step
        return state["iterate"] + k.ahead * step - x


@method(
    "trust-region",
    family="optim",
    paper=Paper(
        "Understanding Gradient Orthogonalization for Deep Learning via Non-Euclidean Trust-Region Optimization",
        arxiv="2503.12645",
        year=2025,
    ),
    tune={"lr": log_uniform(2e-3, 0.2), "rest_lr": log_uniform(1e-5, 1e-2), "weight_decay": log_uniform(1e-3, 1.0)},
    mutant=("average=True, start=start", "average=True"),
)
class TrustRegion(Optimizer):
    """Steps of length lr in a norm of your choice, to where the averaged gradient is least: Muon, signSGD and more in one.

        m <- (1 - a) m + a g        (the first gradient is taken whole: m_0 = g_0)
        x <- argmin over ||z - (1 - b) x|| <= lr of <m, z>  =  (1 - b) x - lr * lmo(m)

    with `a = 1 - momentum`, `b = lr * weight_decay`, and lmo(m) the point of the norm's unit ball that goes furthest along m.
    With decay, `||x||` never exceeds the larger of where it began and `lr / b = 1 / weight_decay`: a ball of that norm is the
    constraint.

    | norm                | lmo(m)                                           | this is                                     |
    |---------------------|--------------------------------------------------|---------------------------------------------|
    | `spectral`          | polar factor of each hidden matrix               | Muon without look-ahead and factor of shape |
    | `l2inf`             | rows of each hidden matrix, of length 1          |                                             |
    | `l21`, `nuclear`    | the longest row; the leading singular pair       | moves little at a time                      |
    | `linf`              | sign                                             | signSGD with momentum                       |
    | `l2`, `global_l2`   | each parameter, or all together, of length 1     | normalized SGD with momentum                |
    | `l1`                | sign of each parameter's largest entry           | greedy coordinate descent                   |

    With a norm of matrices, the first four, embeddings, output heads, norms, biases and vectors are measured in `rest_norm`,
    in groups of their own with their own radius.

    Args:
        lr: 0.02, the radius.
        momentum: 0.95, `1 - a`.
        weight_decay: 0.
        norm: "spectral".
        method, steps: of the polar factor; see `poise.linalg.polar`. Steps have length lr exactly with "qdwh" and "svd".
        start: "zeros" begins the average there, as Muon does: the first gradient then counts only a.
        lmo_first: averages lmo(g) instead, as Orthogonal-SGDM does. The theory is against it, and it does worse under noise.
        rest_norm, rest_lr, rest_weight_decay: of the rest: "linf", 1e-4, 0, which is Signum.
        extrapolate: EXPERIMENTAL. For losses with smooth second derivatives: the gradient is taken at
            `z + (1 - a) / a * (z - z_before)` of the iterates z, so that the average estimates that at z itself. The weights
            are that point; z is in `opt.state[p]["iterate"]`, and is what to keep in the end.
        options: see `Optimizer`.

    Raises:
        ValueError: `extrapolate` with another decay than "coupled", or a setting that is not known.

    State: 1 value per element, 2 with `extrapolate`. Source: "Understanding Gradient Orthogonalization for Deep Learning via
    Non-Euclidean Trust-Region Optimization" (arXiv 2503.12645). The point of extrapolation is that of "Momentum Improves
    Normalized SGD" (arXiv 2002.03305), on which the paper builds.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        *,
        norm: str = "spectral",
        method: str = "polar_express",
        steps: int | None = None,
        start: Start = "gradient",
        lmo_first: bool = False,
        rest_norm: str = "linf",
        rest_lr: float | Tensor = 1e-4,
        rest_weight_decay: float = 0.0,
        extrapolate: bool = False,
        decay: Decay = "coupled",
        **options: Unpack[Options],
    ) -> None:
        check_lmo(norm, method, steps)
        check_rate("rest_lr", rest_lr)
        check_rate("rest_weight_decay", rest_weight_decay)
        if rest_norm in MATRIX_NORMS:
            raise ValueError(f"rest_norm={rest_norm!r}: is for matrices, and the rest are not; take 'linf' or 'l2'")
        if extrapolate and decay != "coupled":
            raise ValueError(f"decay={decay!r}: with extrapolate=True the decay is 'coupled'")

        def rule(norm: str) -> Chain:
            average: Transform = momentum_link(momentum, average=True, start=start)
            best = lmo(norm, method, steps)
            return chain(*((best, average) if lmo_first else (average, best)), *((extrapolated(),) if extrapolate else ()))

        routes = [Route("trust-region", rule(norm), everything, {"lr": lr, "weight_decay": weight_decay})]
        if norm in MATRIX_NORMS:
            routes = [
                Route("trust-region", rule(norm), hidden_matrices, {"lr": lr, "weight_decay": weight_decay}),
                Route("rest", rule(rest_norm), everything, {"lr": rest_lr, "weight_decay": rest_weight_decay}),
            ]
        super().__init__(params, routes, lr, weight_decay, decay, **options)
