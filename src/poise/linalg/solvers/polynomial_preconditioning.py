"""Gradient methods whose preconditioner is a polynomial of a curvature matrix that is known by its products alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from poise.catalog import Paper, choice, method

from ..symmetric_polynomials import Matrix, Preconditioner, as_product, largest

Step = Literal["gradient", "accelerated", "krylov"]
Prox = Callable[[Tensor, float], Tensor]
INNER = 2000  # steps at most for one prox in the norm of P^-1


@dataclass(frozen=True)
class Composite:
    """Where the method ended, of f + psi."""

    x: Tensor
    residual: float  # ||grad f + s|| at the last step, s a subgradient of psi
    iterations: int
    M: float
    converged: bool


@method(
    "polynomial-preconditioning",
    family="linalg",
    kind="solver",
    paper=Paper("Polynomial Preconditioning for Gradient Methods", arxiv="2301.13194", year=2023),
    tune={"tau": choice(1, 2, 3, 5), "step": choice("gradient", "accelerated", "krylov")},
    mutant=("torch.linalg.pinv(K, hermitian=True) @ (Q @ g.reshape(-1))", "Q @ g.reshape(-1)"),
)
def polynomial_gradient(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    B: Matrix,
    tau: int = 2,
    *,
    step: Step = "gradient",
    prox: Prox | None = None,
    M: float | None = None,
    probes: int | None = None,
    generator: torch.Generator | None = None,
    tol: float = 1e-9,
    maxiter: int = 10000,
) -> Composite:
    """Minimizes f by gradient steps in the geometry of `P_tau(B)`, where `mu B <= hess f <= L B`.

        gradient:     x+ = x - 1/M P grad f(x),    P = P_tau / lambda_max(B P_tau)
        with psi:     x+ = argmin over z of <grad f(x), z> + psi(z) + M/2 ||z - x||^2 in the norm of P^-1
        accelerated:  the same from y = x + (t - 1) / t+ (x - x_before), t+ = (1 + sqrt(1 + 4 t^2)) / 2, begun anew where
                      the direction and the last motion disagree
        krylov:       x+ = x - 1/M sum over i = 0 ... tau of a_i B^i grad f(x), the a that minimize the model: no traces are
                      needed, and no fixed P_tau of this degree goes lower

    P, of `poise.linalg.symmetric_polynomials`, cuts the tau largest gaps out of the spectrum of B. A step costs tau products
    with B, one more for "krylov".

    M: a little above L is enough, lambda_max being found from below. None finds it: it is doubled until
    `f(x+) <= f(x) - <grad f - s, x - x+> / 2` (s a subgradient of psi at x+, or 0), and halved for the next step, but not by
    "accelerated", whose M must not fall.

    Args:
        f: smooth and convex, from a tensor to a number.
        x: where to begin, of any shape.
        B: symmetric, positive semi-definite: (n, n), or its product with tensors like x. For `f(x) = phi(A x)`, `A^T A`.
        tau: degree, 0 (the plain method) to n - 1; above 10 only "krylov", whose basis is orthogonalized, is exact enough.
        prox: `prox(v, t) = argmin over z of psi(z) + ||z - v||^2 / (2 t)`, of a simple convex psi. The step with psi is solved
            through its dual, by products with P only.
        probes, generator: of the traces, None for exact ones; see `power_sums`.
        tol: ends where `||grad f + s|| <= tol`.
        maxiter: steps at most.

    Raises:
        ValueError: settings out of range, a prox with "krylov", or a P that is not positive, which only estimated traces or an
            indefinite B can give.

    Source: "Polynomial Preconditioning for Gradient Methods" (arXiv 2301.13194). The test for M is that of the quadratic upper
    model; the restart is O'Donoghue and Candes's (arXiv 1204.3982).
    """
    if step not in get_args(Step):
        raise ValueError(f"step={step!r}: must be one of {', '.join(get_args(Step))}")
    if M is not None and not 0 < M < math.inf:
        raise ValueError(f"M={M}: must be positive and finite")
    if prox is not None and step == "krylov":
        raise ValueError("prox: the steps of 'krylov' have no fixed norm to take it in; use 'gradient' or 'accelerated'")
    if isinstance(B, Tensor) and B.shape != (x.numel(), *x.shape):
        raise ValueError(
            f"B: must be square and x a vector, got {tuple(B.shape)} and {tuple(x.shape)}; or a function of x's shape"
        )
    if not 0 <= tau < x.numel():
        raise ValueError(f"tau={tau}: must lie in 0 .. {x.numel() - 1}")
    at = (
        _krylov(B, tau)
        if step == "krylov"
        else _fixed(Preconditioner(B, tau, like=x, probes=probes, generator=generator), prox)
    )
    with torch.no_grad():
        return _run(f, x.detach(), at, M, step == "accelerated", tol, maxiter)


Taken = tuple[Tensor, Tensor]  # x+ - x, and the subgradient s of psi at x+
At = Callable[[Tensor, Tensor], Callable[[float], Taken]]  # (x, gradient) -> M -> step


def _run(
    f: Callable[[Tensor], Tensor], x: Tensor, at: At, M: float | None, accelerated: bool, tol: float, maxiter: int
) -> Composite:
    both = torch.func.grad_and_value(f)
    size = 1.0 if M is None else M
    y, t, left = x, 1.0, math.inf
    for iteration in range(maxiter):
        g, value = both(y)
        take = at(y, g)
        d, s = take(size)
        while M is None and not _below(f, y, value, g, d, s):
            size = 2 * size
            if not math.isfinite(size):
                raise ValueError("f: no step lowers it; is it finite and convex?")
            d, s = take(size)
        left = float(torch.linalg.vector_norm(g + s))
        if left <= tol:
            return Composite(y + d, left, iteration, size, True)
        before, x = x, y + d
        if not accelerated:
            y, size = x, size if M is not None else size / 2
            continue
        # in the norm of P^-1, y - x is P (g + s) / M: no inverse is needed
        t = 1.0 if float(((g + s) * (x - before)).sum()) > 0 else t
        following = (1 + math.sqrt(1 + 4 * t**2)) / 2
        y, t = x + (t - 1) / following * (x - before), following
    return Composite(x, left, maxiter, size, False)


def _below(f: Callable[[Tensor], Tensor], y: Tensor, value: Tensor, g: Tensor, d: Tensor, s: Tensor) -> bool:
    """Whether f at y + d is below its quadratic upper model, in which `M ||d||^2` is `-<g + s, d>`."""
    model = value + (g * d).sum() - ((g + s) * d).sum() / 2
    return bool(f(y + d) <= model + 10 * torch.finfo(y.dtype).eps * value.abs())


def _krylov(B: Matrix, tau: int) -> At:
    """The best combination of g, B g, ..., B^tau g: in an orthogonal basis of these, as their Gram matrix is hopeless."""
    product = as_product(B)

    def at(y: Tensor, g: Tensor) -> Callable[[float], Taken]:
        rows, products, v = [], [], g.reshape(-1)
        for _ in range(tau + 1):
            whole = torch.linalg.vector_norm(v)
            for _ in range(2):  # once is not enough in floating point
                for q in rows:
                    v = v - (q @ v) * q
            length = torch.linalg.vector_norm(v)
            if not length > 100 * torch.finfo(v.dtype).eps * whole:
                break
            rows.append(v / length)
            v = product(rows[-1].reshape(g.shape)).reshape(-1)
            products.append(v)
        if not rows:
            return lambda M: (torch.zeros_like(g), torch.zeros_like(g))
        Q = torch.stack(rows)
        K = Q @ torch.stack(products, 1)
        best = (Q.mT @ (torch.linalg.pinv(K, hermitian=True) @ (Q @ g.reshape(-1)))).reshape(g.shape)
        return lambda M: (-best / M, torch.zeros_like(g))

    return at


def _fixed(P: Preconditioner, prox: Prox | None) -> At:
    top = largest(P, P.like) if prox is not None else 1.0
    kept: list[Tensor] = []  # the last s, where the next search for one begins

    def at(y: Tensor, g: Tensor) -> Callable[[float], Taken]:
        Pg = P(g)
        if float((g * Pg).sum()) < 0:
            raise ValueError(f"B: P of degree tau={P.tau} is not positive; give estimated traces more probes or less tau")
        if prox is None:
            return lambda M: (-Pg / M, torch.zeros_like(g))

        def take(M: float, prox: Prox = prox) -> Taken:
            x, s = _dual_prox(P, prox, y - Pg / M, M, top, kept[0] if kept else torch.zeros_like(g))
            kept[:] = [s]
            return x - y, s

        return take

    return at


def _dual_prox(P: Preconditioner, prox: Prox, v: Tensor, M: float, top: float, s: Tensor) -> Taken:
    """`argmin over z of psi(z) + M/2 ||z - v||^2` in the norm of P^-1, and `s = M P^-1 (v - z)`, a subgradient there.

    Accelerated proximal gradients on the dual, `min over s of psi*(s) + <s, P s> / 2 M - <s, v>`: whose prox is known too.
    """
    lr = M / (1.01 * top)
    z, moved, t = v, s, 1.0
    for _ in range(INNER):
        w = moved + lr * (v - P(moved) / M)
        z = prox(w / lr, 1 / lr)
        before, s = s, w - lr * z
        if bool(torch.linalg.vector_norm(s - moved) <= 100 * torch.finfo(v.dtype).eps * torch.linalg.vector_norm(w)):
            break
        t = 1.0 if float(((moved - s) * (s - before)).sum()) > 0 else t
        following = (1 + math.sqrt(1 + 4 * t**2)) / 2
        moved, t = s + (t - 1) / following * (s - before), following
    return z, s
