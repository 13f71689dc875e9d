"""Lion-K: Lion with the gradient of any even convex function in the place of the sign."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Unpack

import torch
from torch import Tensor

from poise.catalog import Paper, log_uniform, method
from poise.linalg import norms
from poise.linalg.kappa import GRADIENTS, Kappa

from ..optimizer import Optimizer
from ..options import Options, check_rate
from ..routing import Params, Route, everything, hidden_matrices
from ..transform import Context, State, Transform, chain
from ..transforms.lmo import MATRIX_NORMS, lmo
from ..transforms.momentum import interpolated
from ..transforms.step import Decay, identity


class entrywise(Transform):
    """The gradient of a smooth kappa that treats each entry by itself: `huber`, `softsign`, `logcosh`."""

    blind = True

    def __init__(self, kappa: Kappa) -> None:
        self.kappa = kappa
        self.defaults = {"delta": kappa.delta}

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return GRADIENTS[self.kappa.name](u, k.delta)


class largest_signs(Transform):
    """The signs of the largest entries of a parameter, the gradient of `top_k`."""

    unit = "tensor"
    blind = True

    def __init__(self, kappa: Kappa) -> None:
        self.kappa = kappa

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return self.kappa.gradient(u.reshape(1, -1)).reshape(u.shape) if u.numel() else u


def gradient_of(kappa: Kappa) -> Transform:
    """The link `u <- grad kappa(u)`."""
    if kappa.norm:
        return lmo(norms.NORMS[kappa.name].dual, kappa.method, kappa.steps)
    if kappa.name == "squared_l2":
        return identity()
    return largest_signs(kappa) if kappa.name == "top_k" else entrywise(kappa)


@method(
    "lion-k",
    family="optim",
    paper=Paper("Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts", arxiv="2310.05898", year=2023),
    tune={"lr": log_uniform(5e-4, 0.2), "rest_lr": log_uniform(1e-5, 1e-2), "weight_decay": log_uniform(1e-3, 1.0)},
    mutant=("interpolated(betas)", "interpolated(betas[::-1])"),
)
class LionK(Optimizer):
    """Lion with another shape of step: the gradient of a convex kappa in the place of the sign.

        c  = b1 m + (1 - b1) g
        x <- x - lr * ( grad kappa(c) + weight_decay * x )
        m <- b2 m + (1 - b2) g

    It solves `min f(x) + kappa*(lam x) / lam` with `lam = weight_decay` and the conjugate kappa* of kappa. Where kappa is a
    norm, that is a constraint, and every step shrinks what lies outside of it by at least `1 - lr * lam`:

    | kappa        | step                                         | constraint, lr                                     |
    |--------------|----------------------------------------------|----------------------------------------------------|
    | `nuclear`    | polar factor of each hidden matrix           | spectral norm at most 1 / lam; Muon's lr, 0.02     |
    | `l21`        | rows of each hidden matrix, of length 1      | each row's length at most 1 / lam; as `nuclear`    |
    | `l1`         | sign: this is Lion                           | each entry at most 1 / lam; Lion's lr, 1e-4        |
    | `l2`         | each parameter's c, of length 1              | its length at most 1 / lam                         |
    | `squared_l2` | c itself: momentum                           | none: `lam x^2 / 2` is added to f; SGD's lr        |
    | `huber`, `softsign`, `logcosh` | a sign that is soft below `delta` | each entry below 1 / lam; Lion's lr          |
    | `top_k`      | signs of the largest entries of a parameter  | each entry at most 1 / lam, and their sum too; Lion's lr |

    Any norm of `poise.linalg.norms` may be named. With a norm of matrices, `nuclear` or `l21`, embeddings, output heads, norms,
    biases and vectors get `rest_kappa`, with the same betas, in groups of their own with their own learning rate.

    Args:
        lr: 0.02, for matrices as Muon's; see the table.
        betas: (0.9, 0.99), as in Lion.
        weight_decay: 0.
        kappa: "nuclear".
        delta: 1e-3, width of the smooth kappas in units of c; the smaller, the nearer to the sign.
        top: 0.1, the share of entries that `top_k` moves.
        method, steps: of the polar factor; see `poise.linalg.polar`.
        rest_kappa, rest_lr, rest_weight_decay: of the rest: "l1", 1e-4, 0, which is Lion.
        options: see `Optimizer`.

    State: 1 value per element. Source: "Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts" (arXiv
    2310.05898). Its discrete analysis takes the decay of the new weights, `lam x_{t+1}`; what is used everywhere, and here, is
    that of the old ones. `lyapunov` measures what the theory says must fall.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 0.02,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        kappa: str = "nuclear",
        delta: float = 1e-3,
        top: float = 0.1,
        method: str = "polar_express",
        steps: int | None = None,
        rest_kappa: str = "l1",
        rest_lr: float | Tensor = 1e-4,
        rest_weight_decay: float = 0.0,
        decay: Decay = "coupled",
        **options: Unpack[Options],
    ) -> None:
        check_rate("rest_lr", rest_lr)
        check_rate("rest_weight_decay", rest_weight_decay)
        shape, rest = Kappa(kappa, delta, top, method, steps), Kappa(rest_kappa, delta, top)
        if rest_kappa in MATRIX_NORMS:
            raise ValueError(f"rest_kappa={rest_kappa!r}: is for matrices, and the rest are not; take 'l1', 'l2', ...")
        rule = chain(interpolated(betas), gradient_of(shape))
        routes = [Route("lion-k", rule, everything, {"lr": lr, "weight_decay": weight_decay})]
        if kappa in MATRIX_NORMS:
            rest_rule = chain(interpolated(betas), gradient_of(rest))
            routes = [
                Route("lion-k", rule, hidden_matrices, {"lr": lr, "weight_decay": weight_decay}),
                Route("rest", rest_rule, everything, {"lr": rest_lr, "weight_decay": rest_weight_decay}),
            ]
        super().__init__(params, routes, lr, weight_decay, decay, **options)


def continuous_time(lr: float, betas: tuple[float, float]) -> Mapping[str, float]:
    """The constants alpha, gamma and epsilon of the flow that LionK with these settings follows in steps of time `lr`."""
    b1, b2 = betas
    rate = (1 - b2) / lr
    return {"alpha": rate, "gamma": rate, "epsilon": (1 - b1) / rate}


def lyapunov(
    loss: Tensor | float,
    weights: Iterable[Tensor],
    momenta: Iterable[Tensor],
    kappa: Kappa | str,
    *,
    weight_decay: float,
    alpha: float,
    gamma: float,
    epsilon: float,
) -> Tensor:
    """The function that Lion-K's continuous flow never lets rise: a diagnostic, one number for all weights.

    Of the flow `m' = alpha g - gamma m`, `x' = -grad kappa(m + epsilon (alpha g - gamma m)) - lam x` with `lam = weight_decay`:

        H = alpha f(x) + gamma / lam kappa*(lam x)
            + (1 - epsilon gamma) / (1 + epsilon lam) * ( kappa*(lam x) + kappa(m) + lam <m, x> )

    Here m is the average of gradients that the optimizer keeps, the negative of the paper's. Real steps may raise H by what
    their length and their noise add. It is infinite while weights are outside of a constraint.

    Args:
        loss: f(x).
        weights, momenta: x, and `opt.state[x]["exp_avg"]`; more than two dimensions are read as (first, all others).
        kappa: of all of them: call it for each part of a model by itself, without the loss, and add.
        alpha, gamma, epsilon: what `continuous_time(lr, betas)` gives.

    Raises:
        ValueError: a negative constant, or epsilon * gamma above 1, for which nothing is promised.
    """
    kappa = Kappa(kappa) if isinstance(kappa, str) else kappa
    for name, constant in dict(weight_decay=weight_decay, alpha=alpha, gamma=gamma, epsilon=epsilon).items():
        check_rate(name, constant)
    if epsilon * gamma > 1 + 1e-12:
        raise ValueError(f"epsilon={epsilon}, gamma={gamma}: their product must be at most 1")
    share = (1 - epsilon * gamma) / (1 + epsilon * weight_decay)
    total = alpha * torch.as_tensor(loss, dtype=torch.float64)
    for x, m in zip(weights, momenta, strict=True):
        x, m = (t.detach().double().reshape(len(t) if t.ndim > 1 else 1, -1) for t in (x, m))
        wall = kappa.conjugate(weight_decay * x)
        total = total + share * (wall + kappa.value(m) + weight_decay * norms.inner(m, x))
        if weight_decay:
            total = total + gamma / weight_decay * wall
    return total
