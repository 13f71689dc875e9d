"""OPT-AMSGrad: AMSGrad with half a step along the gradient that is expected next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Unpack, get_args

import torch
from torch import Tensor

from poise.catalog import Paper, choice, log_uniform, method
from poise.linalg.extrapolation import limit_weights

from ..optimizer import Optimizer
from ..options import Options
from ..routing import Params
from ..transform import Context, Param, Slot, State, Transform, chain
from ..transforms.adaptive import check_betas, check_eps
from ..transforms.step import add_l2

Predictor = Literal["extrapolation", "last", "fed", "none"]
Variance = Literal["error", "gradient"]


class optimistic_amsgrad(Transform):
    """AMSGrad whose weights stand a predicted step ahead of the iterate that it moves. See `OptAMSGrad`, whose options it has.

    What is kept of the iterate z is its distance to the weights, `lr h / (sqrt(vh) + eps)`.
    """

    owns_step = True

    def __init__(
        self,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        predictor: Literal["last", "fed", "none"] = "last",
        variance: Variance = "error",
    ) -> None:
        check_betas(betas)
        check_eps(eps)
        if variance not in get_args(Variance):
            raise ValueError(f"variance={variance!r}: must be 'error' or 'gradient'")
        self.predictor: Predictor = predictor
        self.variance: Variance = variance
        self.feeds = ("prediction",) if predictor == "fed" else ()
        self.defaults = {"betas": tuple(betas), "eps": eps}

    def slots(self, p: Param) -> dict[str, Slot]:
        shape = tuple(p.shape)
        kept = {"exp_avg": Slot(shape), "exp_avg_sq": Slot(shape, kind="nonneg"), "max_exp_avg_sq": Slot(shape, kind="upper")}
        return kept if self.predictor == "none" else kept | {"prediction": Slot(shape), "ahead": Slot(shape)}

    def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float]:
        b1, b2 = map(float, hyper["betas"])
        return {"b1": b1, "c1": 1 - b1, "b2": b2, "c2": 1 - b2, "eps": float(hyper["eps"]), "lr": float(hyper["lr"])}

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        before = state["exp_avg"]
        m = state["exp_avg"] = k.b1 * before + k.c1 * u
        surprise = u - state["prediction"] if self.variance == "error" and self.predictor != "none" else u
        v = state["exp_avg_sq"] = k.b2 * state["exp_avg_sq"] + k.c2 * surprise.square()
        largest = state["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], v)
        rate = k.lr / (largest.sqrt() + k.eps)
        if self.predictor == "none":
            return -rate * m
        p = state["prediction"] = self.predicted(state, k)
        behind = state["ahead"]
        ahead = state["ahead"] = rate * (k.b1 * before + k.c1 * p)
        return behind - rate * m - ahead

    def predicted(self, state: State, k: Context) -> Tensor:
        """The gradient that is expected next."""
        return k.prediction if self.predictor == "fed" else k.grad


class extrapolating_amsgrad(optimistic_amsgrad):
    """`optimistic_amsgrad` that predicts where the last gradients are going.

    Extrapolation is of all gradients as one vector, over every parameter whose rule holds this very object.
    """

    def __init__(
        self,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        history: int = 5,
        ridge: float = 1e-3,
        variance: Variance = "error",
    ) -> None:
        super().__init__(betas, eps, variance=variance)
        if history < 1:
            raise ValueError(f"history={history}: must be at least 1")
        if not ridge > 0.0:
            raise ValueError(f"ridge={ridge}: must be positive")
        self.predictor, self.ridge = "extrapolation", ridge
        self.past = [f"gradient_{i}" for i in range(history + 1)]

    def slots(self, p: Param) -> dict[str, Slot]:
        # differences of gradients are smaller than the rounding of small formats
        return super().slots(p) | {name: Slot(tuple(p.shape), kind="exact") for name in self.past}

    def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float]:
        return super().scalars(step, hyper) | {"full": float(step >= len(self.past))}

    def measure(self, u: Tensor, state: State, x: Tensor, k: Context) -> dict[str, Tensor]:
        """The raw gradient joins the past; products of its differences, where there are enough of them."""
        for older, newer in zip(self.past, self.past[1:], strict=False):
            state[older] = state[newer]
        state[self.past[-1]] = u
        steps = [state[b].double() - state[a].double() for a, b in zip(self.past, self.past[1:], strict=False)]
        return {f"product_{i}_{j}": k.full * (a * b).sum() for i, a in enumerate(steps) for j, b in enumerate(steps) if j <= i}

    def reduce(self, totals: dict[str, Tensor], shared: State, k: Context) -> dict[str, Tensor]:
        r = range(len(self.past) - 1)
        gram = torch.stack([torch.stack([totals[f"product_{max(i, j)}_{min(i, j)}"] for j in r]) for i in r])
        return {f"weight_{i}": c for i, c in enumerate(limit_weights(gram, self.ridge).unbind())}

    def predicted(self, state: State, k: Context) -> Tensor:
        limit = sum((k.total[f"weight_{i}"] * state[name] for i, name in enumerate(self.past[:-1])), torch.zeros_like(k.grad))
        return k.full * limit + (1 - k.full) * k.grad


@method(
    "opt-amsgrad",
    family="optim",
    paper=Paper("An Optimistic Acceleration of AMSGrad for Nonconvex Optimization", arxiv="1903.01435", year=2021),
    tune={
        "lr": log_uniform(1e-5, 1e-2),
        "weight_decay": log_uniform(1e-6, 1e-2),
        "betas": choice((0.9, 0.95), (0.9, 0.99), (0.9, 0.999)),
    },
    mutant=("(k.b1 * before + k.c1 * p)", "(k.b1 * m + k.c1 * p)"),
    exempt={
        "the_state_of_a_large_matrix_takes_the_bytes_it_should": "of 11 values an element, 6 are past gradients, kept as they "
        "are: their differences are what is extrapolated, and are smaller than the rounding of small formats",
    },
)
class OptAMSGrad(Optimizer):
    """AMSGrad with half a step along the gradient that is expected next.

    z is moved by what gradients were, the weights x stand ahead of it by what the next one is expected to be, p:

        m' = m;   m <- b1 m + (1 - b1) g
        v <- b2 v + (1 - b2) (g - p)^2;   vh <- max(vh, v)
        z <- z - lr * m / (sqrt(vh) + eps)
        p <- prediction;   x <- z - lr * (b1 m' + (1 - b1) p) / (sqrt(vh) + eps)

    Args:
        lr: 1e-3.
        betas: (0.9, 0.999), of the first author's scripts (0.99 in his read-me). eps: 1e-8, added to the root.
        weight_decay: 0; added to g as `weight_decay * x`, and not to what predictions are made of.
        predictor: "extrapolation": where the last history + 1 gradients are going (`linalg.extrapolation`), the last gradient
            until there are as many. "last" gradient. "fed": `opt.feed(prediction=...)` before each step gives the gradient
            expected after it. "none": AMSGrad without bias correction.
        history: 5. ridge: 1e-3, relative to the largest eigenvalue, where the first author's code has it absolute, which ruins
            the extrapolation of small and of large gradients.
        variance: "error" averages (g - p)^2; "gradient" g^2.
        options: see `Optimizer`.

    State: 11 values per element with 5 differences, 5 for "last" and "fed", 3 for "none"; past gradients stay in float32 under
    every `state=`. Source: "An Optimistic Acceleration of AMSGrad for Nonconvex Optimization" (arXiv 1903.01435). Followed is
    the paper, not the first author's code, which corrects Adam's bias, and extrapolates weights by a second backward.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        predictor: Predictor = "extrapolation",
        history: int = 5,
        ridge: float = 1e-3,
        variance: Variance = "error",
        **options: Unpack[Options],
    ) -> None:
        if predictor not in get_args(Predictor):
            raise ValueError(f"predictor={predictor!r}: must be one of {', '.join(get_args(Predictor))}")
        if predictor == "extrapolation":
            ahead = extrapolating_amsgrad(betas, eps, history, ridge, variance)
        else:
            ahead = optimistic_amsgrad(betas, eps, predictor, variance)
        rule = chain(add_l2(), ahead)
        super().__init__(params, rule, lr, weight_decay, **options)
