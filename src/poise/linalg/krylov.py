"""Linear systems `A x = b` of which only products with A are known, over tensors or trees of tensors.

| solver      | for A                                                | a step costs                       | vectors kept |
|-------------|------------------------------------------------------|------------------------------------|--------------|
| `cg`        | symmetric, positive definite (or negative)           | one product                        | 4            |
| `normal_cg` | any; of least squares where there is no solution     | one with A, one with its transpose | 5            |
| `gmres`     | any that is square, if its spectrum is kind          | one product                        | `restart`    |
| `bicgstab`  | the same, without the memory                         | two products                       | 7            |
| `lu`        | any that is small and invertible                     | n products in all, and n^3         | n            |
| `cholesky`  | symmetric, positive definite, small                  | the same                           | n            |

All have one form, `solve(matvec, b, rmatvec=None, **settings) -> x`:

- `matvec` and `rmatvec` take a tree like b to a tree like b, `A v` and `A^T v`. Only `normal_cg` needs the transpose, and finds
  it by autograd if it is not given.
- `batch_dims`: as many leading dimensions, which all leaves share, count independent systems. Each has its own step
  lengths and ends by itself. 0: the whole tree is one vector.
- `ridge`: solves `(A + ridge I) x = b`; `normal_cg` solves `(A^T A + ridge I) x = A^T b`.
- The iterative ones end where `||b - A x|| <= max(rtol ||b||, atol)`, after `maxiter` steps (default 10 n) at the latest;
  for `normal_cg` both sides are multiplied by A^T. `rtol` is 100 eps of the dtype by default. They begin at `x0`, or at zero.
- They warn, `RuntimeWarning`, if a residual remains that is more than the root of eps of b.

Computed in float32, or in float64 if a leaf is.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from .systems import Operator, System, dot, over
from .trees import Tree

Name = Literal["cg", "normal_cg", "gmres", "bicgstab", "lu", "cholesky"]


class Solve(Protocol):
    """What can take the place of a solver of this module."""

    def __call__(self, matvec: Operator, b: Tree, rmatvec: Operator | None = None) -> Tree: ...


def solver(solve: Name | Solve) -> Solve:
    """The solver of that name, or the function itself."""
    if callable(solve):
        return solve
    if solve not in SOLVERS:
        raise ValueError(f"solve={solve!r}: must be a function or one of {', '.join(SOLVERS)}")
    return SOLVERS[solve]


def cg(matvec: Operator, b: Tree, rmatvec: Operator | None = None, **settings: Any) -> Tree:
    """Conjugate gradients. See the module for arguments."""
    s = System("cg", matvec, b, **settings)
    x, r = s.start()
    p, s.size = r, dot(r, r)
    for active in s.iterations():
        q = s.product(p)
        alpha = over(s.size, dot(p, q), active)
        x, r = x + alpha * p, r - alpha * q
        before, s.size = s.size, dot(r, r)
        p = r + over(s.size, before, active) * p
    return s.finish(x)


def normal_cg(matvec: Operator, b: Tree, rmatvec: Operator | None = None, **settings: Any) -> Tree:
    """Conjugate gradients on the normal equations, in the form (CGLS) that never forms a residual of the squared system."""
    s = System("normal_cg", matvec, b, **settings)
    ridge, s.ridge = s.ridge, 0.0  # here it belongs to A^T A
    back = s.flat(transposed(matvec, b) if rmatvec is None else rmatvec)
    s.demand(back(s.b))
    x, r = s.start()
    g = back(r) - ridge * x
    p, s.size = g, dot(g, g)
    for active in s.iterations():
        q = s.product(p)
        alpha = over(s.size, dot(q, q) + ridge * dot(p, p), active)
        x, r = x + alpha * p, r - alpha * q
        g = back(r) - ridge * x
        before, s.size = s.size, dot(g, g)
        p = g + over(s.size, before, active) * p
    return s.finish(x)


def gmres(matvec: Operator, b: Tree, rmatvec: Operator | None = None, *, restart: int = 50, **settings: Any) -> Tree:
    """Generalized minimal residuals, begun anew after `restart` steps; `maxiter` counts all of them."""
    if restart < 1:
        raise ValueError(f"restart={restart}: must be at least 1")
    s = System("gmres", matvec, b, **settings)
    x, r = s.start()
    s.size, done = dot(r, r), 0
    while done < s.maxiter and bool((active := s.size > s.limit).any()):
        beta = s.size.sqrt()
        V, columns = [over(r, beta)], []
        for _ in range(min(restart, s.b.shape[-1], s.maxiter - done)):
            w, basis = s.product(V[-1]), torch.stack(V, -1)
            h = torch.zeros_like(basis[..., :1, :])
            for _ in range(2):  # once is not enough in floating point
                part = w[..., None, :] @ basis
                w, h = w - (basis @ part.mT)[..., 0], h + part
            length = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
            columns.append(torch.cat([h[..., 0, :], length], -1))
            V.append(over(w, length))
            # the residual of the small least-squares problem is beta times what e_1 has in the last column of Q
            Q = torch.linalg.qr(_hessenberg(columns), mode="complete").Q
            if not bool((active & ((beta * Q[..., 0, -1:]).square() > s.limit)).any()):
                break
        y = beta[..., None] * torch.linalg.pinv(_hessenberg(columns))[..., :, :1]
        x = x + torch.where(active, (torch.stack(V[:-1], -1) @ y)[..., 0], 0.0)
        r = s.b - s.product(x)
        s.size, done = dot(r, r), done + len(columns)
    return s.finish(x)


def bicgstab(matvec: Operator, b: Tree, rmatvec: Operator | None = None, **settings: Any) -> Tree:
    """Stabilized bi-conjugate gradients. Where they break down, they begin anew from the residual they have."""
    s = System("bicgstab", matvec, b, **settings)
    x, r = s.start()
    shadow, p, rho, s.size = r, r, dot(r, r), dot(r, r)
    for active in s.iterations():
        v = s.product(p)
        alpha = over(rho, dot(shadow, v), active)
        half = r - alpha * v
        t = s.product(half)
        omega = over(dot(t, half), dot(t, t), active)
        x = x + alpha * p + omega * half
        r = torch.where(active, half - omega * t, r)
        before, rho, s.size = rho, dot(shadow, r), dot(r, r)
        beta = over(rho, before, active) * over(alpha, omega, active)
        # orthogonal to its shadow but for rounding: nothing more is to be had from this shadow
        lost = rho.abs() <= torch.finfo(r.dtype).eps * (dot(shadow, shadow) * s.size).sqrt()
        shadow = torch.where(lost, r, shadow)
        p = torch.where(lost, r, r + beta * (p - omega * v))
        rho = torch.where(lost, s.size, rho)
    return s.finish(x)


def lu(matvec: Operator, b: Tree, rmatvec: Operator | None = None, *, batch_dims: int = 0, ridge: float = 0.0) -> Tree:
    """Elimination on the matrix, which is written out. Raises `torch.linalg.LinAlgError` if it is singular."""
    s = System("lu", matvec, b, batch_dims=batch_dims, ridge=ridge)
    return s.unravel(torch.linalg.solve(s.matrix(), s.b[..., None])[..., 0])


def cholesky(matvec: Operator, b: Tree, rmatvec: Operator | None = None, *, batch_dims: int = 0, ridge: float = 0.0) -> Tree:
    """Cholesky's factors of the matrix, which is written out. Raises ValueError if it has none."""
    s = System("cholesky", matvec, b, batch_dims=batch_dims, ridge=ridge)
    L, info = torch.linalg.cholesky_ex(s.matrix())
    if bool(info.any()):
        raise ValueError(f"matvec: with ridge={ridge} it must be symmetric and positive definite for cholesky")
    return s.unravel(torch.cholesky_solve(s.b[..., None], L)[..., 0])


SOLVERS: dict[str, Solve] = {
    "cg": cg,
    "normal_cg": normal_cg,
    "gmres": gmres,
    "bicgstab": bicgstab,
    "lu": lu,
    "cholesky": cholesky,
}


def transposed(matvec: Operator, like: Tree) -> Operator:
    """`A^T v` by autograd, for a linear `matvec` from trees like `like` to such trees."""
    pull = torch.func.vjp(matvec, like)[1]
    return lambda v: pull(v)[0]


def _hessenberg(columns: list[Tensor]) -> Tensor:
    rows = len(columns) + 1
    return torch.stack([torch.nn.functional.pad(c, (0, rows - c.shape[-1])) for c in columns], -1)


__all__ = ["SOLVERS", "Operator", "Solve", "bicgstab", "cg", "cholesky", "gmres", "lu", "normal_cg", "solver", "transposed"]
