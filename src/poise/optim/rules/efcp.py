"""EFCP: preconditioners of the last m gradients, kept sparse or of low rank, with error feedback before them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Unpack, get_args

import torch
from torch import Tensor

from poise.catalog import Paper, choice, log_uniform, method, uniform
from poise.memory.sparse import TopK, check_kept

from ..optimizer import Optimizer
from ..options import Options
from ..routing import Params
from ..transform import Transform, chain
from ..transforms.compressed_rows import LowRankRows, SparseRows
from ..transforms.gradient_window import Per, Rows, check_damping, fisher, windowed
from ..transforms.momentum import momentum as momentum_link
from ..transforms.step import Decay

Compressor = Literal["topk", "lowrank"]
Preconditioner = Literal["m-fac", "ggt"]
JITTER = 1e-6  # added to the squared singular values, as released


def ggt(gram: Tensor, row: int, age: Tensor, hyper: Mapping[str, float]) -> Tensor:
    """Weights of the rows in GGT's step `U (diag(1 / (s + eps)) - I / eps) U^T c + c / eps`, c being one of them.

    With C the rows as columns, each times decay^age, `C^T C + 1e-6 I = V diag(s^2) V^T` and `U = C V diag(1 / s)`. As c = C e,
    `U^T c = diag(s - 1e-6 / s) V^T e`, and the two terms in c / eps, which nearly cancel, need not be formed.
    """
    eps = hyper["damping"]
    fading = hyper["window_decay"] ** age.double()
    gram = gram * fading * fading[:, None]
    finite = gram.isfinite().all()
    jitter = JITTER * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    squares, V = torch.linalg.eigh(torch.where(finite, gram, 0.0) + jitter)
    s = squares.clamp(min=JITTER).sqrt()
    weights = fading * (V @ ((1 + JITTER / (s * eps)) / (s + eps) * V[row]))
    return torch.where(finite, weights, torch.nan)


@method(
    "efcp",
    family="optim",
    paper=Paper("Error Feedback Can Accurately Compress Preconditioners", arxiv="2306.06098", year=2023),
    tune={
        "lr": log_uniform(1e-4, 1e-1),
        "damping": log_uniform(1e-6, 1e-2),
        "momentum": uniform(0.0, 0.95),
        "weight_decay": log_uniform(1e-6, 1e-1),
        "window": choice(32, 64, 128),
        "density": choice(0.01, 0.05),
    },
    mutant=("value_dtype, error_feedback)", "value_dtype, not error_feedback)"),
    exempt={
        "bfloat16_weights_move_on_average_as_their_float32_twins": "entries move in turns and F^(-1) turns their steps "
        "about, so rounding spreads with their path, not with the distance; M-FAC's own file tests what they share",
        "the_state_of_a_large_matrix_takes_the_bytes_it_should": "the window is compressed already and is exact: its products "
        "are kept from step to step and must be those of the rows that are there",
        "hyper_parameters_changed_in_a_group_take_effect": "density decides the sizes of the state and can be no entry of a "
        "group; its own file tests those that are",
    },
)
class EFCP(Optimizer):
    """M-FAC or GGT with a window in a hundredth of the memory: what compression leaves of a gradient is added to the next.

        e <- e + g;   c = compress(e);   e <- e - c
        u  = F^(-1) c,  F = damping I + 1/m sum over the last m of c c^T                                        ("m-fac")
        u  = (C C^T)^(-1/2) c,  damped, C the last m of c as columns, each times window_decay^age               ("ggt")
        v <- momentum * v + (1 - momentum) * u
        x <- x - lr * ( v + weight_decay * x )

    It is the compressed c that is preconditioned. compress is one of:

        "topk"     of each block of neighbours the largest entries, `density` of them, as int16 places and values
        "lowrank"  P Q^T with P = orthonormal columns of e Q and Q <- e^T P, of each weight as (out, in * kernel); vectors whole

    Args:
        lr: 1e-3. momentum: 0. weight_decay: 0, decoupled; the releases of GGT and low-rank M-FAC have `decay="l2"`.
        window: m, 1024. GGT solves an eigenproblem of that size in every step: take 100 to 200 for it.
        damping: 1e-5; the paper takes 5e-5 on BERT and 1e-7 on ImageNet. Under GGT it is eps, added to each singular value s.
        compressor: "topk". preconditioner: "m-fac".
        density: 0.01, at least one entry of each block. block: 4096 neighbours, at most 32768.
        value_dtype: of kept entries, torch.bfloat16 or torch.float32; what rounding takes from them stays in e.
        rank: 1, columns of P and Q.
        window_decay: 1, in (0, 1]; of GGT alone.
        per: "model": all parameters are one vector, their products added up; "tensor": each has a window of its own.
        error_feedback: off leaves e at 0.
        options: see `Optimizer`.

    State: 1 value an element for e, 1 more with momentum, and of the window 4 m density bytes an element in bfloat16 (41 with
    the defaults, where M-FAC has 4096), or m rank (out + in) values of a matrix. Under FSDP2 each rank keeps the whole window.

    Source: "Error Feedback Can Accurately Compress Preconditioners" (arXiv 2306.06098) and its releases. Unlike there, GGT's
    decay acts on C wherever it stands, since U is orthonormal only then, and Q starts from normal numbers and not from the
    weights, which may be zero.
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
        compressor: Compressor = "topk",
        preconditioner: Preconditioner = "m-fac",
        density: float = 0.01,
        block: int = 4096,
        value_dtype: torch.dtype = torch.bfloat16,
        rank: int = 1,
        window_decay: float = 1.0,
        per: Per = "model",
        error_feedback: bool = True,
        decay: Decay = "coupled",
        **options: Unpack[Options],
    ) -> None:
        check_damping(damping)
        check_kept("value_dtype", value_dtype)
        for name, value, known in (
            ("compressor", compressor, get_args(Compressor)),
            ("preconditioner", preconditioner, get_args(Preconditioner)),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, known))}")
        if rank < 1:
            raise ValueError(f"rank={rank}: must be 1 or more")
        if not 0.0 < window_decay <= 1.0:
            raise ValueError(f"window_decay={window_decay}: must be in (0, 1]")
        if window_decay != 1.0 and preconditioner != "ggt":
            raise ValueError(f"window_decay={window_decay}: is of preconditioner='ggt' alone")
        rows: Rows = LowRankRows(rank, error_feedback)
        if compressor == "topk":
            rows = SparseRows(TopK(density, block), value_dtype, error_feedback)
        if preconditioner == "ggt":
            solved = windowed(rows, window, ggt, {"damping": damping, "window_decay": window_decay}, per)
        else:
            solved = windowed(rows, window, fisher, {"damping": damping}, per)
        links: list[Transform] = [solved]
        if momentum:
            links.append(momentum_link(momentum, average=True))
        super().__init__(params, chain(*links), lr, weight_decay, decay, **options)
