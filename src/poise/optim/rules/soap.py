"""SOAP: Adam in the eigenbasis of Shampoo's statistics."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from poise.catalog import Paper, choice, log_uniform, method

from ..optimizer import Optimizer
from ..options import Options, check_rate
from ..routing import Params, Route, everything, hidden_matrices
from ..transform import Transform, chain
from ..transforms.adaptive import adam, debias, factored_adam
from ..transforms.rotation import Form, Sides, rotated
from ..transforms.spectral import unit_rms
from ..transforms.step import Decay


@method(
    "soap",
    family="optim",
    paper=Paper("SOAP: Improving and Stabilizing Shampoo using Adam", arxiv="2409.11321", year=2024),
    tune={
        "lr": log_uniform(1e-4, 3e-2),
        "weight_decay": log_uniform(1e-3, 1.0),
        "betas": choice((0.9, 0.95), (0.95, 0.95), (0.95, 0.99)),
    },
    mutant=("debias(betas, gathered=1)", "debias(betas, gathered=0)"),
    exempt={
        "the_state_of_a_large_matrix_takes_the_bytes_it_should": "L, R, Q_L and Q_R are bfloat16 already and are not encoded; "
        "of 12 bytes an entry, a format makes the 4 of the momentum smaller",
    },
)
class SOAP(Optimizer):
    """Adam in the slowly refreshed eigenbasis of the gradient's own second moments; AdamW for everything but matrices.

    For each hidden matrix `W` (rows = outputs; a convolution as (out, in * kernel), each of stacked experts on its own), with
    `L`, `R` the averages of `G G^T` and `G^T G` and `Q_L`, `Q_R` their eigenvectors as they were at the last refresh:

        G'   = Q_L^T G Q_R
        m   <- b1 m + (1 - b1) G';   v <- b2 v + (1 - b2) G'^2
        W   <- W - lr * sqrt(1 - b2^t) / (1 - b1^t) * Q_L ( m / (sqrt(v) + eps) ) Q_R^T
        W   <- (1 - lr * weight_decay) W
        L   <- b L + (1 - b) G G^T;   R <- b R + (1 - b) G^T G;   and where f divides t, for each of the two:
               Q <- qr(L Q).Q, its columns ordered by diag(Q^T L Q) first; m is carried into the new basis, v reordered

    The first call only gathers: it sets L, R and their eigenvectors. No matrix moves or decays in it, and t stays 0.

    Embeddings and output heads go to AdamW, as do norms, biases and vectors, in groups of their own: the side of a vocabulary
    is too long for a factor, and rows that few tokens touch have no common basis. `{"params": ..., "rule": "soap"}` sends them
    to SOAP all the same.

    Args:
        lr: 3e-3.
        betas: (0.95, 0.95). shampoo_beta: b; None takes b2.
        eps: 1e-8, added to the root before bias correction.
        weight_decay: 0.01, after the step as in the release (`decay="after"`).
        precondition_frequency: f, 10: steps between refreshes, the larger the cheaper and the worse.
        max_precond_dim: 10000. A longer side has no factor; where both are longer, nothing is rotated.
        form: "compact" keeps L, R, Q_L and Q_R in bfloat16, of v the means of its rows and columns (`factored_adam`), and of
            long sides only the diagonal blocks of their factors (`rotated`), so that state is at most 12 bytes an entry and 4
            for each row and column. "full" is the published form: whole factors and v in float32, 24 bytes an entry of a square
            matrix and 42 of one four times as wide as high.
        block_size: the longest block of a factor; None for no bound but that of `form`.
        sides: "left" (outputs) or "right" (inputs) rotates one side only.
        normalize_grads: the rotated-back update is divided by its RMS. The authors found it to help at f = 100, to hurt at 10.
        correct_bias: off leaves out the factor `sqrt(1 - b2^t) / (1 - b1^t)`.
        inner: another rule in Adam's place, such as `lion()`: betas, eps and correct_bias are then its own business.
        adamw_lr, adamw_betas, adamw_weight_decay: of the rest; None for SOAP's, which is Adam there too.
        options: see `Optimizer`.

    State: see `form`; `state=` encodes the momentum and v. Source: "SOAP: Improving and Stabilizing Shampoo using Adam" (arXiv
    2409.11321) and its release, which is followed where they differ. Unlike the release: a convolution is one matrix and not a
    tensor with a factor for each axis, AdamW's parameters move from the first call on, and m, which the release rotates back
    and forth at every step, is rotated at refreshes only.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        form: Form = "compact",
        block_size: int | None = None,
        sides: Sides = "both",
        normalize_grads: bool = False,
        correct_bias: bool = True,
        inner: Transform | None = None,
        adamw_lr: float | Tensor | None = None,
        adamw_betas: tuple[float, float] | None = None,
        adamw_weight_decay: float | None = None,
        decay: Decay = "after",
        **options: Unpack[Options],
    ) -> None:
        adamw_lr = lr if adamw_lr is None else adamw_lr
        adamw_weight_decay = weight_decay if adamw_weight_decay is None else adamw_weight_decay
        check_rate("adamw_lr", adamw_lr)
        check_rate("adamw_weight_decay", adamw_weight_decay)
        links: list[Transform] = [debias(betas, gathered=1)] if correct_bias and inner is None else []
        if inner is None:
            inner = adam(betas, eps, correct_bias=False) if form == "full" else factored_adam(betas, eps)
        if normalize_grads:
            links.insert(0, unit_rms())
        turned = rotated(inner, precondition_frequency, shampoo_beta, max_precond_dim, form, block_size, sides)
        routes = [
            Route("soap", chain(turned, *links), hidden_matrices, {"lr": lr, "weight_decay": weight_decay}),
            Route("adamw", adam(adamw_betas or betas, eps), everything, {"lr": adamw_lr, "weight_decay": adamw_weight_decay}),
        ]
        super().__init__(params, routes, lr, weight_decay, decay, **options)
