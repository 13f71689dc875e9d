"""M-FAC: the gradient through the inverse of an empirical Fisher matrix of the last m gradients."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from poise.catalog import Paper, choice, log_uniform, method, uniform
from poise.memory.sparse import check_kept

from ..optimizer import Optimizer
from ..options import Options
from ..routing import Params
from ..transform import Transform, chain
from ..transforms.gradient_window import DenseRows, Per, check_damping, fisher, windowed
from ..transforms.momentum import momentum as momentum_link
from ..transforms.step import Decay


@method(
    "m-fac",
    family="optim",
    paper=Paper(
        "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information",
        arxiv="2107.03356",
        year=2021,
    ),
    tune={
        "lr": log_uniform(1e-4, 1e-1),
        "damping": log_uniform(1e-6, 1e-2),
        "momentum": uniform(0.0, 0.95),
        "weight_decay": log_uniform(1e-6, 1e-2),
        "window": choice(32, 64, 128),
    },
    mutant=("fisher, {", "lambda gram, *rest: len(gram) * fisher(gram, *rest), {"),
    exempt={
        "the_state_of_a_large_matrix_takes_the_bytes_it_should": "the window is exact: its products are kept from step to step "
        "and must be those of the rows that are there; window_dtype= halves it",
        "bfloat16_weights_move_on_average_as_their_float32_twins": "F^(-1) shrinks what gradients have in common, so under "
        "noise steps turn about, and rounding spreads with their path, not their distance; its own file tests it without noise",
    },
)
class MFAC(Optimizer):
    """Natural gradient by the last m gradients of the whole model, one vector each: all their correlations, no matrix.

        g  = gradient + weight_decay * x
        F  = damping I + 1/m sum of h h^T over the last m such g, this one included
        v <- momentum * v + (1 - momentum) * F^(-1) g
        x <- x - lr * v

    Gradients before the first are zeros, with 1/m all the same. With G the m gradients as rows, `F^(-1) g = G^T w` for the w of
    an m x m system whose entries are products of gradients; a step computes m new ones. One pass over the window finds them and
    one more applies w, so a step costs 2 m multiplications an element and a factorization of m x m on top.

    Args:
        lr: 1e-3. F^(-1) undoes the size of a gradient along what the window holds, so a good lr depends on window and damping.
        momentum: 0 turns it off.
        weight_decay: 0, in the gradient as released (`decay="l2"`).
        window: m, 1024. What it costs is memory. The sample run of the release has 512.
        damping: 1e-5. No less than 1.2e-7 of the mean squared length of the m gradients, which is what float32 resolves.
        per: "model" as published; "tensor" gives each parameter a Fisher matrix of its own.
        window_dtype: torch.bfloat16 halves the window; it is then the rounded gradient that is preconditioned.
        options: see `Optimizer`.

    State: m values an element, 1 more with momentum. m x m numbers, once or for each parameter. Of sharded parameters each rank
    keeps its shard of the window, and only products are added up.

    Source: "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information" (arXiv 2107.03356), its dynamic algorithm
    and its release. They update a triangular factorization; here the same system is solved by Cholesky, for the weights of
    the rows directly: g being a row, no difference of nearly equal vectors is taken. "tensor" is ours.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        window: int = 1024,
        damping: float = 1e-5,
        per: Per = "model",
        window_dtype: torch.dtype = torch.float32,
        decay: Decay = "l2",
        **options: Unpack[Options],
    ) -> None:
        check_damping(damping)
        check_kept("window_dtype", window_dtype)
        links: list[Transform] = [windowed(DenseRows(window_dtype), window, fisher, {"damping": damping}, per)]
        if momentum:
            links.append(momentum_link(momentum, average=True))
        super().__init__(params, chain(*links), lr, weight_decay, decay, **options)
