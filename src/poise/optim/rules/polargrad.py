"""PolarGrad: the polar factor of the momentum, as long as its nuclear norm says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from torch import Tensor

from poise.catalog import Paper, log_uniform, method
from poise.linalg import norms, polar

from ..optimizer import Optimizer
from ..options import Options
from ..routing import Params
from ..skeleton import AdamWRest
from ..transform import Context, Param, Slot, State, Transform, chain
from ..transforms.lmo import sharp
from ..transforms.momentum import momentum as momentum_link
from ..transforms.spectral import by_matrix
from ..transforms.step import Decay


class averaged_polar(Transform):
    """`U = polar(u)`, `nu = <u, U>`, `buf <- mu buf + (1 - mu) U`, result `nu buf`: the momentum of directions alone."""

    unit = "matrix"
    blind = True

    def __init__(self, momentum: float, method: str, steps: int | None) -> None:
        polar.check_options(method, steps, "auto", None)
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum={momentum}: must be in [0, 1)")
        self.method, self.steps = method, steps
        self.defaults = {"momentum": momentum}

    def slots(self, p: Param) -> dict[str, Slot]:
        return {"momentum_buffer": Slot(tuple(p.shape))}

    def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float]:
        mu = float(hyper["momentum"])
        return {"mu": mu, "weight": 1 - mu}

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        U = by_matrix(lambda G: polar.orthogonalize(G, self.method, steps=self.steps), k.param, u)
        buf = state["momentum_buffer"] = k.mu * state["momentum_buffer"] + k.weight * U
        return by_matrix(lambda G, O, b: norms.inner(G, O)[..., None, None] * b, k.param, u, U, buf)


@method(
    "polargrad",
    family="optim",
    paper=Paper(
        "PolarGrad: A Class of Matrix-Gradient Optimizers from a Unifying Preconditioning Perspective",
        arxiv="2505.21799",
        year=2025,
    ),
    tune={"lr": log_uniform(1e-3, 10.0), "adamw_lr": log_uniform(1e-4, 3e-2), "weight_decay": log_uniform(1e-4, 1.0)},
    mutant=("momentum_link(momentum, average=True)", "momentum_link(momentum)"),
    exempt={
        "training_goes_on_as_with_float32": "steps shrink with the gradient, so at a pace set by the first one 40 of them take "
        "the loss to 0.853 of what it was, and not to 0.85; its own file has the same test at twice that pace",
    },
)
class PolarGrad(Optimizer):
    """Muon times the nuclear norm: steps that shrink with the gradient, so that a constant lr converges; AdamW for the rest.

    For each hidden matrix `W` (rows = outputs; a convolution as (out, in * kernel), each of stacked experts and each part of a
    fused q, k, v on its own):

        buf <- mu buf + (1 - mu) G
        U    = polar(buf),   nu = <buf, U>          (the nuclear norm: the sum of singular values)
        W   <- W - lr * ( nu U + weight_decay * W )

    or with `polar_first`

        U    = polar(G),     nu = <G, U>
        buf <- mu buf + (1 - mu) U
        W   <- W - lr * ( nu buf + weight_decay * W )

    Without momentum both are `W - lr nu polar(G)`, the steepest descent of the spectral norm. Embeddings, output heads, norms,
    biases and vectors go to AdamW, in groups of their own with their own learning rate.

    Args:
        lr: 0.02. Of SGD's kind: where the gradient is L-Lipschitz, 1 / (L r) is safe without momentum, r the smaller side of W.
        momentum: mu, 0.95. 0 keeps no buffer.
        weight_decay: 0.
        polar_first: off.
        method: of the polar factor: "qdwh" converges for every matrix; any other of `poise.linalg.polar` may be named.
        inner_steps: None: until converged. The release stops QDWH after 2 steps, whose factor is 8 to 18% off in float32.
        adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay: of the rest: 3e-4, (0.9, 0.95), 1e-10, 0, as in Muon.
        options: see `Optimizer`.

    A matrix that has lost rank, as of neurons that never fire, has no direction in its null space; "qdwh" completes it with an
    arbitrary one, which moves by lr nu like the others, "svd" leaves it alone.

    State: 1 value per element of the matrices, 2 of the rest. Source: "PolarGrad: A Class of Matrix-Gradient Optimizers from a
    Unifying Preconditioning Perspective" (arXiv 2505.21799) and its release, without its coefficient 2.031 of Newton-Schulz, a
    slip of the pen for 2.0315.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        *,
        polar_first: bool = False,
        method: str = "qdwh",
        inner_steps: int | None = None,
        adamw_lr: float | Tensor = 3e-4,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-10,
        adamw_weight_decay: float = 0.0,
        decay: Decay = "coupled",
        **options: Unpack[Options],
    ) -> None:
        rest = AdamWRest(adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay)
        if momentum == 0:
            rule = chain(sharp("spectral", method, inner_steps))
        elif polar_first:
            rule = chain(averaged_polar(momentum, method, inner_steps))
        else:
            rule = chain(momentum_link(momentum, average=True), sharp("spectral", method, inner_steps))
        super().__init__(params, rest.beside("polargrad", rule, lr, weight_decay), lr, weight_decay, decay, **options)
