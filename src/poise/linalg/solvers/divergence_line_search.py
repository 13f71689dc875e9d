"""Experimental: Newton's method for saddle points, damped by the divergence of its own step instead of a merit function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from poise.catalog import Paper, method

Function = Callable[[Tensor], Tensor]
HALVINGS = 10  # of a step; where tc has no minimum on the way by then, the step is taken whole
FLOOR = 1e-12  # relative to the largest, the least that an eigenvalue of the Hessian counts as


@dataclass(frozen=True)
class NewtonRun:
    """What a run did."""

    x: Tensor
    iterations: int
    gradient: float  # norm of the gradient at x: above `tol` where the limit came first
    taus: list[float]  # tau before each step
    shares: list[float]  # of the Newton step that were taken


def newton_divergence(f: Function, x: Tensor) -> tuple[Tensor, Tensor]:
    """The Newton step nu(x) = -H^-1 grad f, and tau(x) = -div nu / n.

        tau = 1 + tr(H^-1 DH[nu]) / n,    DH[nu] the derivative of the Hessian along nu

    tau is 1 at stationary points with a regular Hessian, and everywhere where f is quadratic. It takes one Hessian and one
    derivative of it along a vector. Eigenvalues of H within 1e-12 of 0, relative to the largest, are moved there: a step
    through a singular H is long, not infinite.

    Args:
        f: of a vector (n,), differentiable three times; in an optimization with constraints, the Lagrangian of unknowns and
            multipliers.
        x: (n,).
    """
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        g = _gradient(f(z), z)
        H = _jacobian(g, z)
    values, V = torch.linalg.eigh((H + H.mT).detach() / 2)
    least = FLOOR * values.abs().max()
    held = torch.where(values.abs() > least, values, torch.where(values < 0, -least, least))
    inverse = V / torch.where(held != 0, held, 1.0) @ V.mT
    nu = -inverse @ g.detach()
    with torch.enable_grad():
        change = _jacobian(H @ nu, z).detach()  # third derivatives are symmetric: this is DH[nu]
    return nu, 1 + (inverse * change).sum() / len(x)


@method(
    "experimental-divergence-line-search",
    family="linalg",
    kind="solver",
    paper=Paper("Exploring an Alternative Line-Search Method for Lagrange-Newton Optimization", arxiv="2601.08431", year=2026),
    mutant=("(inverse * change)", "(inverse.diagonal() * change.diagonal())"),
)
def experimental_newton(
    f: Function, x: Tensor, *, damped: bool = True, tol: float = 1e-10, limit: int = 100, slack: float = 1e-6
) -> NewtonRun:
    """Experimental: Newton's method for stationary points of f, saddle points too, with steps damped by their divergence.

    With nu and tau of `newton_divergence` and tc = (tau - 1)^2, which has ravines tc = 0 that lead to stationary points:

        x <- x + t nu
        t = 1                                       where tc(x) <= slack: out of the ravine
        t = 1, 1/2, 1/4, ... to the first minimum   elsewhere, of tc(x + t nu): back to it; 1 if it is not below tc(x)

    No merit function and no penalty is needed, at the price of a derivative of the Hessian for each point that is tried.
    Whether this is of use is open, as the paper says itself. Where the Hessian becomes singular at the stationary point, tau
    does not go to 1 there, and the damped method creeps where Newton's arrives.

    Args:
        f: see `newton_divergence`.
        x: where to begin, (n,), float64.
        damped: False for t = 1 throughout.
        tol: ends where the gradient's norm is below this.
        limit: of steps.
        slack: up to which tc counts as 0.

    Raises:
        ValueError: naming the argument that is not allowed.

    Source: "Exploring an Alternative Line-Search Method for Lagrange-Newton Optimization" (arXiv 2601.08431). The criterion is
    the paper's; how steps out of the ravine and back take turns was put together from its abstract.
    """
    if x.ndim != 1 or not x.is_floating_point():
        raise ValueError(f"x: must be a vector of floating point, got {x.dtype} of shape {tuple(x.shape)}")
    if not tol > 0 or limit < 0 or slack < 0:
        raise ValueError(f"tol={tol}, limit={limit}, slack={slack}: must not be negative, tol positive")
    taus: list[float] = []
    shares: list[float] = []
    for _ in range(limit):
        if steepness(f, x) < tol:
            break
        nu, tau = newton_divergence(f, x)
        t = share(f, x, nu, float(tau), slack) if damped else 1.0
        taus.append(float(tau))
        shares.append(t)
        x = x + t * nu
    return NewtonRun(x, len(shares), steepness(f, x), taus, shares)


def steepness(f: Function, x: Tensor) -> float:
    """The norm of the gradient."""
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        return float(_gradient(f(z), z).detach().norm())


def share(f: Function, x: Tensor, nu: Tensor, tau: float, slack: float) -> float:
    """t."""
    here = (tau - 1) ** 2
    if here <= slack:
        return 1.0
    t, found = 1.0, _squared(f, x + nu)
    for _ in range(HALVINGS):
        nearer = _squared(f, x + t / 2 * nu)
        if found <= here and found <= nearer:
            return t
        t, found = t / 2, nearer
    return 1.0


def _squared(f: Function, x: Tensor) -> float:
    return float((newton_divergence(f, x)[1] - 1).square())


def _gradient(value: Tensor, z: Tensor) -> Tensor:
    """With a graph of its own; zeros where the value does not depend on z."""
    if not value.requires_grad:
        return torch.zeros_like(z)
    return torch.autograd.grad(value, z, create_graph=True, materialize_grads=True)[0]


def _jacobian(vector: Tensor, z: Tensor) -> Tensor:
    """Row by row: for the few unknowns that a dense Hessian allows, faster than torch.func."""
    return torch.stack([_gradient(entry, z) for entry in vector])
