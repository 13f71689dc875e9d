"""Newton's method with lazy Hessians: a new gradient for every step, a new Hessian for every m."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from poise.catalog import Paper, choice, log_uniform, method

from ..cubic import cubic_step
from ..trees import Tree, ravel

Regularization = Literal["cubic", "quadratic"]
ACCEPTED = 0.2  # of sum ||g_i||^(3/2) / sqrt(M): see `lazy_newton`
LEAST = 1e-12  # of the M given: how far the adaptive method may go down


@dataclass(frozen=True)
class Minimum:
    """Where the method ended."""

    x: Tree
    value: float
    gradient_norm: float
    iterations: int  # steps taken, those of refused phases too; each costs a gradient
    hessians: int
    M: float  # as it was last: "adaptive" changes it
    converged: bool


@method(
    "lazy-hessians",
    family="linalg",
    kind="solver",
    paper=Paper("Second-Order Optimization with Lazy Hessians", arxiv="2212.00781", year=2023),
    tune={"M": log_uniform(1e-3, 1e3), "regularization": choice("cubic", "quadratic")},
    mutant=("curvature.step(point.g, M)", "curvature.step(curvature.g, M)"),
)
def lazy_newton(
    f: Callable[[Tree], Tensor],
    x: Tree,
    M: float = 1.0,
    m: int | None = None,
    *,
    regularization: Regularization = "cubic",
    adaptive: bool = False,
    hessian: Callable[[Tree], Tensor] | None = None,
    tol: float = 1e-9,
    maxiter: int = 1000,
) -> Minimum:
    """Minimizes f by regularized Newton steps whose Hessian is as old as the last of every m steps.

        g_k = grad f(x_k),   H = hess f(z),   z = x_k at the last k that m divides
        cubic:      x_{k+1} = x_k + argmin over h of <g_k, h> + <H h, h> / 2 + M ||h||^3 / 6          any f; M = 6 m L
        quadratic:  x_{k+1} = x_k - (H + sqrt(M ||g_k||) I)^-1 g_k                                    convex f; M = 3 m L

    with L a Lipschitz constant of the Hessian. Each Hessian is decomposed once, O(d^3), after which a step is O(d^2): with
    m = d, the best in theory, a Hessian costs about what the d gradients do that come with it.

    "adaptive" finds M by itself, for cubic steps. It takes a phase of m steps and holds it against what theory promises,

        f(start) - f(end) >= 0.2 / sqrt(M) * sum ||grad f(x_i)||^(3/2)    over the points that the phase went to;

    a phase that fails is taken back and done again with 2 M, from the same Hessian; after one that does not, M / 4 is tried.
    From M = 6 m L on no phase fails.

    Cubic steps leave strict saddles, even from where the gradient is zero or has no part along the descent: see `cubic_step`.
    They end only where the gradient is small and the newest Hessian that is known has no negative eigenvalue.

    Args:
        f: from a tree like x to a number, twice differentiable by torch.func. Of a model's weights,
            `lambda w: loss(torch.func.functional_call(model, w, inputs))` with `x=dict(model.named_parameters())`.
        x: where to begin: a tensor or a tree of d numbers in all, float32 or float64.
        M: above; where the adaptive method begins. In practice far less than theory asks for is best, often by 100 times.
        m: steps to a Hessian; d by default. 1 is the ordinary regularized Newton method.
        hessian: in place of torch.func's: from a tree like x to (d, d), in the order of the leaves.
        tol: ends where `||g|| <= tol`.
        maxiter: steps at most.

    Raises:
        ValueError: M or m out of range; quadratic regularization where the Hessian is not positive semi-definite, or
            adaptive.

    Source: "Second-Order Optimization with Lazy Hessians" (arXiv 2212.00781). The constant 0.2 is ours: with 1 in its place the
    exact hard case, a step from a strict saddle of a quadratic, fails for every M, since there the sides are M r^3 times 1/4
    and 1/sqrt(8). What can be shown for M = 6 m L and any m is 0.22.
    """
    if not 0 < M < math.inf:
        raise ValueError(f"M={M}: must be positive and finite")
    if regularization not in get_args(Regularization):
        raise ValueError(f"regularization={regularization!r}: must be one of {', '.join(get_args(Regularization))}")
    if adaptive and regularization != "cubic":
        raise ValueError(f"regularization={regularization!r}: the adaptive method takes cubic steps")
    if m is not None and m < 1:
        raise ValueError(f"m={m}: must be at least 1")
    vector, unravel = ravel(x)
    vector = vector.detach()

    def flat(v: Tensor) -> Tensor:
        return f(unravel(v))

    def second(v: Tensor) -> Tensor:
        return torch.func.hessian(flat)(v) if hessian is None else hessian(unravel(v)).to(v)

    run = _Run(flat, second, regularization == "cubic", m or vector.numel(), tol, maxiter)
    with torch.no_grad():
        end, M = run(vector, M, adaptive)
    norm = float(torch.linalg.vector_norm(end.g))
    return Minimum(unravel(end.x), float(end.value), norm, run.steps, run.hessians, M, norm <= tol)


class _Point(NamedTuple):
    x: Tensor
    g: Tensor
    value: Tensor


class _Curvature:
    """A Hessian, decomposed, and the gradient where it was taken."""

    def __init__(self, H: Tensor, g: Tensor, cubic: bool) -> None:
        self.values, self.vectors = torch.linalg.eigh((H + H.mT) / 2)
        self.g, self.cubic = g, cubic
        least, size = float(self.values[0]), float(self.values.abs().max())
        self.saddle = least < -(torch.finfo(H.dtype).eps ** 0.5) * size
        if self.saddle and not cubic:
            raise ValueError(f"f: quadratic regularization is for convex f, but an eigenvalue of its Hessian is {least:.3g}")

    def step(self, g: Tensor, M: float) -> Tensor:
        if self.cubic:
            return cubic_step(self.values, self.vectors, g, M)
        shift = (M * torch.linalg.vector_norm(g)).sqrt()
        return -self.vectors @ ((self.vectors.mT @ g) / (self.values.clamp_min(0.0) + shift))


class _Run:
    """One run, on vectors. A point is (x, gradient, value)."""

    def __init__(
        self,
        f: Callable[[Tensor], Tensor],
        second: Callable[[Tensor], Tensor],
        cubic: bool,
        m: int,
        tol: float,
        maxiter: int,
    ) -> None:
        self.both, self.second = torch.func.grad_and_value(f), second
        self.cubic, self.m, self.tol, self.maxiter = cubic, m, tol, maxiter
        self.steps = self.hessians = 0

    def __call__(self, x: Tensor, M: float, adaptive: bool) -> tuple[_Point, float]:
        point, least, curvature = self.point(x), LEAST * M, None
        while self.steps < self.maxiter:
            # a saddle that an old Hessian has seen may lie behind, and at the start nothing is known
            if self.small(point) and (not self.cubic or (curvature is not None and not curvature.saddle)):
                break
            self.hessians += 1
            curvature = _Curvature(self.second(point.x), point.g, self.cubic)
            if self.small(point) and not curvature.saddle:
                break
            if adaptive:
                point, M = self.accepted(point, curvature, M, least)
            else:
                point, _ = self.phase(point, curvature, M)
        return point, M

    def phase(self, point: _Point, curvature: _Curvature, M: float) -> tuple[_Point, float]:
        """Up to m steps: where they end, and the sum of ||g||^(3/2) over where they went."""
        total = 0.0
        for taken in range(self.m):
            if self.steps == self.maxiter or (taken and self.small(point)):
                break
            point = self.point(point.x + curvature.step(point.g, M))
            self.steps += 1
            total += float(torch.linalg.vector_norm(point.g)) ** 1.5
        return point, total

    def accepted(self, start: _Point, curvature: _Curvature, M: float, least: float) -> tuple[_Point, float]:
        """The end of a phase that keeps what theory promises, and the M to go on with."""
        rounding = 10 * torch.finfo(start.x.dtype).eps * float(start.value.abs())
        while self.steps < self.maxiter:
            end, total = self.phase(start, curvature, M)
            if float(start.value - end.value) >= ACCEPTED / math.sqrt(M) * total - rounding:
                return end, max(M / 4, least)
            M = 2 * M
        return start, M

    def point(self, x: Tensor) -> _Point:
        g, value = self.both(x)
        return _Point(x, g, value)

    def small(self, point: _Point) -> bool:
        return float(torch.linalg.vector_norm(point.g)) <= self.tol
