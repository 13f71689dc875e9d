"""LANTON: steps in each layer's own norm, shorter where its gradients are noisier."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from poise.catalog import Paper, log_uniform, method

from ..optimizer import Optimizer
from ..options import Options, check_rate
from ..routing import Params, Route, by_role, everything, hidden_matrices
from ..transform import Context, Param, State, Transform, chain
from ..transforms.momentum import momentum as momentum_link
from ..transforms.noise import Noise, noise_adaptive, noise_adaptive_matrix
from ..transforms.sign import sign
from ..transforms.spectral import ScaleRule, orthogonalize, shape_scale
from ..transforms.step import Decay


class unit_rms_tensor(Transform):
    """The update of each parameter divided by the root mean square of its entries: `u <- u / (1e-30 + RMS(u))`."""

    unit = "tensor"
    blind = True

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return u / (1e-30 + u.square().mean().sqrt())

    def update_rms(self, p: Param) -> float:
        return 1.0


@method(
    "lanton",
    family="optim",
    paper=Paper(
        "Noise-Adaptive Layerwise Learning Rates: Accelerating Geometry-Aware Optimization for Deep Neural Network Training",
        arxiv="2510.14009",
        year=2025,
    ),
    tune={"lr": log_uniform(3e-4, 0.1), "sign_lr": log_uniform(1e-5, 1e-2), "weight_decay": log_uniform(1e-3, 1.0)},
    mutant=("noise_adaptive_matrix(spectral, ", "noise_adaptive_matrix([sign()], "),
)
class LANTON(Optimizer):
    """Muon, sign and normalized momentum by what a layer is, with learning rates that shrink with each layer's own noise.

    For each parameter l, with B its momentum and G' its previous gradient,

        B   <- momentum B + (1 - momentum) G;   O = lmo(B)
        H_l <- b H_l + (1 - b) ||G - G'||_*^2
        a_l  = alpha / sqrt(alpha^2 + H_l)
        W   <- (1 - lr * weight_decay) W - lr * sqrt(a_l / max a) O

    | layers                       | norm                                      | lmo(B)       | dual norm `||.||_*`   |
    |------------------------------|-------------------------------------------|--------------|-----------------------|
    | hidden matrices              | spectral norm / s                         | s polar(B)   | s * nuclear norm      |
    | embeddings and output heads  | largest entry                             | sign(B)      | sum of absolute values|
    | norms, biases and vectors    | root mean square                          | B / RMS(B)   | n * RMS               |

    and the maximum over the layers of one line of the table. The least noisy layer of a line moves by its lr exactly, no other
    by more; one that is c times noisier than the rest moves by some `c^(-1/2)` of it.

    Args:
        lr: 3e-3, of hidden matrices. sign_lr: 3e-4, of embeddings and heads. vector_lr: of the rest; None: sign_lr.
        momentum: 0.95, without look-ahead.
        weight_decay: 0.1. It follows lr, not the layer's share of it.
        noise_beta: b, 0.9.
        noise: "previous" compares with the last gradient; "independent" with that of another batch at the same weights, which
            `opt.feed(independent_grad=...)` gives before each step.
        alpha: None: the median of sqrt(H_l) over the layers of a line, which stands still from step 100 on.
        noise_every: 1: steps between looks at the noise. For matrices, each costs a second polar factor.
        method, steps: how polar(B) is found, and in how many iterations; see `poise.linalg.polar`.
        scale_rule: s: "match_rms" 0.2 sqrt(max(rows, columns)); "spectral" sqrt(rows/columns), of the norm that takes an RMS
            of inputs to an RMS of outputs; see `shape_scale`.
        options: see `Optimizer`.

    State: 2 values per element and 1 for each parameter. Source: "Noise-Adaptive Layerwise Learning Rates: Accelerating
    Geometry-Aware Optimization for Deep Neural Network Training" (arXiv 2510.14009). Its alpha, learning rates and b were
    not at hand: the defaults are ours.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 3e-3,
        sign_lr: float | Tensor = 3e-4,
        vector_lr: float | Tensor | None = None,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        noise_beta: float = 0.9,
        *,
        noise: Noise = "previous",
        alpha: float | None = None,
        noise_every: int = 1,
        method: str = "polar_express",
        steps: int | None = None,
        scale_rule: ScaleRule = "match_rms",
        decay: Decay = "coupled",
        **options: Unpack[Options],
    ) -> None:
        vector_lr = sign_lr if vector_lr is None else vector_lr
        check_rate("sign_lr", sign_lr)
        check_rate("vector_lr", vector_lr)
        settings = (noise_beta, noise, alpha, noise_every)
        average = momentum_link(momentum, average=True)
        spectral = (orthogonalize(method, steps), shape_scale(scale_rule))
        hidden = chain(average, *spectral, noise_adaptive_matrix(spectral, *settings))
        signs = chain(average, sign(), noise_adaptive([sign()], *settings))
        vectors = chain(average, unit_rms_tensor(), noise_adaptive([unit_rms_tensor()], *settings))
        routes = [
            Route("spectral", hidden, hidden_matrices, {"lr": lr, "weight_decay": weight_decay}),
            Route("sign", signs, by_role("embedding", "head"), {"lr": sign_lr, "weight_decay": weight_decay}, optional=True),
            Route("rms", vectors, everything, {"lr": vector_lr, "weight_decay": weight_decay}),
        ]
        super().__init__(params, routes, lr, weight_decay, decay, **options)
