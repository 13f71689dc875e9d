"""Shampoo: gradients between inverse roots of their own row and column moments."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from poise.catalog import Paper, choice, log_uniform, method
from poise.linalg.roots import Damping

from ..optimizer import Optimizer
from ..options import Options
from ..routing import Params, Route, everything
from ..transforms.grafting import Graft, Grafting
from ..transforms.kronecker import Root, as_matrix, kronecker, kronecker_vector
from ..transforms.step import Decay


@method(
    "shampoo",
    family="optim",
    paper=Paper("Preconditioned Stochastic Tensor Optimization", arxiv="1802.09568", year=2018),
    tune={
        "lr": log_uniform(1e-4, 1e-1),
        "weight_decay": log_uniform(1e-3, 1.0),
        "betas": choice((0.9, 0.95), (0.9, 0.99), (0.9, 0.999)),
        "grafting": choice("adam", "rmsprop"),
        "precondition_frequency": choice(10, 20),
    },
    mutant=("grafting_beta2, grafting_eps)", "1.0, grafting_eps)"),
    exempt={
        "the_state_of_a_large_matrix_takes_the_bytes_it_should": "L, R and their roots, 16 of 24 bytes an element, are not "
        "encoded: eigenvalues many decades apart do not live in few bits; a format makes the 8 of m and v smaller",
    },
)
class Shampoo(Optimizer):
    """Gradients preconditioned by inverse roots of their row and column moments, a factored form of full-matrix Adagrad.

    For each block of at most `max_preconditioner_dim` rows and columns of each matrix (rows = outputs; a convolution as (out,
    in * kernel), each of stacked experts on its own; embeddings and output heads too):

        L <- b2 L + w G G^T;   R <- b2 R + w G^T G                w = 1 - b2, or 1 where b2 = 1
        m <- b1 m + (1 - b1) G;   M = m / (1 - b1^t)
        u  = (L / (1 - b2^t))^(-1/4) M (R / (1 - b2^t))^(-1/4)    without correction where b2 = 1
        u <- u ||s(M)|| / (||u|| + 1e-16)                         with grafting, s(M) the step of another rule
        W <- W - lr ( u + weight_decay W )

    A vector has L alone, with -1/2. Roots are taken at step `start_preconditioning_step` and then at each that
    `precondition_frequency` divides; before, u is s(M), or M without grafting.

    The method as first published is `betas=(0.0, 1.0), damping="add"`: `W <- W - lr L^(-1/4) G R^(-1/4)`, L and R sums from
    `eps I` on. Its first step, for eps -> 0, is along the polar factor of G.

    Args:
        lr: 1e-2. With grafting, choose it as for the rule that is grafted; without, it is like no other rule's.
        betas: (0.9, 1.0). Sums (b2 = 1) let steps without grafting shrink as 1 / sqrt(t).
        eps: 1e-12. damping: "floor" moves all eigenvalues up until the smallest is eps, if it was less; "add" adds eps to all,
            which the release does first: take it to follow the release with an eps that counts.
            What no gradient has shown when roots are taken is given eps^(-1/4): with rare roots and small batches, take more.
        weight_decay: 0.
        precondition_frequency: 1, as published; set 50 to 100 for large models: a block of side b costs some 20 b^3.
        start_preconditioning_step: None: precondition_frequency.
        max_preconditioner_dim: 1024. Other blocks are another method: results of two settings differ.
        grafting: "none"; "sgd", "adam", "rmsprop" or "adagrad", each over M. Set it: with "adam" learning rates are Adam's.
        grafting_beta2: None takes b2. grafting_eps: 1e-8.
        exponent: of matrices; None: 1/4. 1/2 is nearer to full-matrix moments.
        root: "eigh", in float64 for blocks up to 1024, or "newton", products alone in the precision at hand.
        correct_bias: the divisors by 1 - b^t of M, L and R.
        merge_dims: a matrix with at most max_preconditioner_dim entries becomes one vector, with -1/2. On in the release; off
            here, because that is full-matrix Adagrad and not this method.
        options: see `Optimizer`.

    State: 20 bytes per element of matrices and 4 more for adaptive grafting, whatever the blocks; L, R and their roots are not
    encoded by `state=`. Source: "Preconditioned Stochastic Tensor Optimization" (arXiv 1802.09568); the practical form is that
    of "Scalable Second Order Optimization for Deep Learning" (arXiv 2002.09018) and of the release of "A Distributed
    Data-Parallel PyTorch Implementation of the Distributed Shampoo Optimizer for Training Neural Networks At-Scale" (arXiv
    2309.06497), which is followed. Unlike it: a convolution has two sides and not one for each axis, eps is at least the
    rounding of L and R, and a root that cannot be found never ends the run.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 1.0),
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        *,
        precondition_frequency: int = 1,
        start_preconditioning_step: int | None = None,
        max_preconditioner_dim: int = 1024,
        grafting: Graft = "none",
        grafting_beta2: float | None = None,
        grafting_eps: float = 1e-8,
        exponent: float | None = None,
        damping: Damping = "floor",
        root: Root = "eigh",
        correct_bias: bool = True,
        merge_dims: bool = False,
        decay: Decay = "coupled",
        **options: Unpack[Options],
    ) -> None:
        settings = (
            betas,
            eps,
            precondition_frequency,
            start_preconditioning_step,
            max_preconditioner_dim,
            exponent,
            Grafting(grafting, grafting_beta2, grafting_eps),
            damping,
            root,
            correct_bias,
            merge_dims,
        )
        routes = [
            Route("shampoo", kronecker(*settings), as_matrix, optional=True),
            Route("vectors", kronecker_vector(*settings), everything),
        ]
        super().__init__(params, routes, lr, weight_decay, decay, **options)
