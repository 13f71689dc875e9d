"""A low-rank matrix from measurements of which some are grossly wrong: sub-gradients on factors that begin tiny."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from poise.catalog import Paper, method


@dataclass(frozen=True)
class Recovery:
    """A factor, and how well it fits."""

    U: Tensor  # (d, rank); the matrix is U U^T
    losses: list[float]  # the mean absolute error before each step, and after the last

    @property
    def matrix(self) -> Tensor:
        return self.U @ self.U.mT


@method(
    "robust-matrix-recovery",
    family="linalg",
    kind="solver",
    paper=Paper("Global Convergence of Sub-gradient Method for Robust Matrix Recovery", arxiv="2202.08788", year=2022),
    mutant=("torch.sign(fitted - y)", "(fitted - y)"),
)
@torch.no_grad()
def robust_recovery(
    A: Tensor,
    y: Tensor,
    rank: int,
    *,
    lr: float = 0.5,
    decay: float = 0.98,
    steps: int = 400,
    alpha: float = 1e-6,
    start: Tensor | None = None,
) -> Recovery:
    """A positive semi-definite matrix X = U U^T from measurements y_i = <A_i, X>, some of them grossly wrong.

        min over U  1/m sum_i |<A_i, U U^T> - y_i|
        D_t = 1/m sum_i sign(<A_i, U U^T> - y_i) (A_i + A_i^T) U
        U <- U - lr decay^t D_t
        U_0 = alpha B,   B B^T the part of rank `rank` and of positive eigenvalues of 1/m sum_i sign(y_i) (A_i + A_i^T) / 2

    The rank may be larger than that of X: begun tiny, directions that X has not stay tiny while those that it has grow, so that
    no penalty is needed, and no more measurements. Squares instead of absolute values would fit what is wrong.

    Args:
        A: (m, d, d). y: (m,).
        rank: columns of U, at least the rank of X.
        lr: about half the norm of U that is sought, over that of X: 0.5 for a matrix of norm near 1.
        decay: 0.97 to 0.99, where measurements are wrong or noisy: the error ends near the last step's length. 1: equal steps.
        steps: 400.
        alpha: 1e-6. The error falls with it, at the price of log(1 / alpha) steps more.
        start: U_0, (d, rank), in place of the one above, to see what a large one does.

    Raises:
        ValueError: naming the argument that does not fit.

    Source: "Global Convergence of Sub-gradient Method for Robust Matrix Recovery" (arXiv 2202.08788), for the objective and the
    tiny start. The geometric steps are a choice of this library: what the paper takes for each kind of noise was not found out.
    """
    m, d = len(y), A.shape[-1]
    if A.shape != (m, d, d) or y.ndim != 1 or not m:
        raise ValueError(f"A, y: shapes {tuple(A.shape)} and {tuple(y.shape)} do not fit; (m, d, d) and (m,) are needed")
    if not 1 <= rank <= d:
        raise ValueError(f"rank={rank}: must be in 1 .. {d}")
    if not lr > 0 or not 0 < decay <= 1 or not alpha > 0 or steps < 0:
        raise ValueError(f"lr={lr}, decay={decay}, alpha={alpha}, steps={steps}: must be positive, decay at most 1")
    if start is not None and start.shape != (d, rank):
        raise ValueError(f"start: shape {tuple(start.shape)}; must be {(d, rank)}")
    rows = ((A + A.mT) / 2).reshape(m, d * d)
    U = alpha * _positive_part((torch.sign(y) @ rows / m).reshape(d, d), rank) if start is None else start
    losses: list[float] = []
    for t in range(steps + 1):
        fitted = rows @ (U @ U.mT).flatten()
        losses.append(float((fitted - y).abs().mean()))
        if t < steps:
            D = 2 / m * (torch.sign(fitted - y) @ rows).reshape(d, d) @ U
            U = U - lr * decay**t * D
    return Recovery(U, losses)


def _positive_part(C: Tensor, rank: int) -> Tensor:
    """B (d, rank) with B B^T nearest to C."""
    values, V = torch.linalg.eigh(C)
    return V[:, -rank:] * values[-rank:].clamp_min(0).sqrt()
