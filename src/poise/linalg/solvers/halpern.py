"""Halpern's iteration, and what it tells of a map without a fixed point: by how much every point is moved at least."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from poise.catalog import Paper, method

Scheme = Literal["halpern", "plain"]
Verdict = Literal["infeasible", "feasible", "undecided"]


@dataclass(frozen=True)
class Displacement:
    """What n steps tell of v, the shortest displacement `x - T x` of any point."""

    x: Tensor  # x_n
    steps: int  # n
    by_iterate: Tensor  # v from how far the iterates have gone: 2 (x_0 - x_n) / n, or (x_0 - x_n) / n of the plain iteration
    by_residual: Tensor  # v from the last step: x_n - T x_n
    drift: float  # how far `by_iterate` has moved since half as many steps, relative to its norm
    verdict: Verdict  # whether x = T x has a solution


def residual_bound(n: int, distance: float = 1.0) -> float:
    """The most that `||x_n - T x_n - v||` can be after n steps of Halpern's iteration.

        distance (sqrt(H_n + 12) + 1) / (n + 1),    H_n = 1 + 1/2 + ... + 1/n

    `distance` is `||x_0 - x*||` to any point x* whose displacement is v. With a bound R on it, a
    residual longer than `residual_bound(n, R)` proves that there is no fixed point.
    """
    harmonic = math.fsum(1 / i for i in range(1, n + 1))
    return distance * (math.sqrt(harmonic + 12) + 1) / (n + 1)


@method(
    "infeasibility-detection",
    family="linalg",
    kind="diagnostic",
    paper=Paper(
        "Accelerated Infeasibility Detection of Constrained Optimization and Fixed-Point Iterations",
        arxiv="2303.15876",
        year=2023,
    ),
    mutant=("(k + 1) / (k + 2)", "(k + 1) / (k + 3)"),
)
@torch.no_grad()
def displacement(
    T: Callable[[Tensor], Tensor],
    x0: Tensor,
    steps: int = 200,
    *,
    scheme: Scheme = "halpern",
    tol: float = 1e-3,
    settled: float = 0.1,
) -> Displacement:
    """Whether x = T x has a solution, from the iterates of a map that brings no two points further apart.

    The infimal displacement vector v is the point nearest to 0 in the closure of {x - T x}; it is 0 where there is a fixed
    point, or one is approached. For Douglas-Rachford splitting of two convex sets it is the gap between them.

        halpern   x_{k+1} = x_0 / (k + 2) + (k + 1) / (k + 2) T x_k      2 (x_0 - x_n) / n -> v,   x_n - T x_n -> v
        plain     x_{k+1} = T x_k                                          (x_0 - x_n) / n -> v,   x_n - T x_n -> v

    Squared, the error of Halpern's residual falls as 1 / n^2 but for a logarithm (`residual_bound`), which is as fast as can
    be; that of the plain one as 1 / n, and if T is averaged.

    The verdict is "feasible" where the iterate's estimate is at most `tol` long, "infeasible" where it is longer and settled,
    and "undecided" otherwise. From n / 2 to n steps its error halves: where there is a solution, that is all of it.

    Args:
        T: the map, of tensors of the shape of x0.
        x0: where to begin.
        steps: n, 200.
        scheme: "halpern" or "plain".
        tol: length of v that counts as none, in units of x.
        settled: the drift up to which v counts as settled.

    Raises:
        ValueError: naming the argument that is not allowed.

    Source: "Accelerated Infeasibility Detection of Constrained Optimization and Fixed-Point Iterations" (arXiv 2303.15876); the
    constants of the bound are those of its Theorem 8.
    """
    if steps < 2:
        raise ValueError(f"steps={steps}: must be at least 2")
    if scheme not in get_args(Scheme):
        raise ValueError(f"scheme={scheme!r}: must be one of {', '.join(get_args(Scheme))}")
    if not tol > 0 or not settled > 0:
        raise ValueError(f"tol={tol}, settled={settled}: must be positive")
    pace = 2.0 if scheme == "halpern" else 1.0
    x, earlier = x0, torch.zeros_like(x0)
    for k in range(steps):
        if k == steps // 2:
            earlier = pace * (x0 - x) / k
        x = x0 / (k + 2) + (k + 1) / (k + 2) * T(x) if scheme == "halpern" else T(x)
    v = pace * (x0 - x) / steps
    length = float(torch.linalg.vector_norm(v))
    drift = float(torch.linalg.vector_norm(v - earlier)) / length if length else 0.0
    verdict: Verdict = "feasible" if length <= tol else "infeasible" if drift <= settled else "undecided"
    return Displacement(x, steps, v, x - T(x), drift, verdict)
