"""A linear system `(A + ridge I) x = b` on vectors: what all of `krylov`'s solvers begin with, and when they end."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .trees import Tree, ravel

Operator = Callable[[Tree], Tree]


class System:
    """One system, or a batch of independent ones, on vectors (*batch, n). `krylov` says what the arguments mean."""

    def __init__(
        self,
        name: str,
        matvec: Operator,
        b: Tree,
        *,
        x0: Tree | None = None,
        batch_dims: int = 0,
        ridge: float = 0.0,
        rtol: float | None = None,
        atol: float = 0.0,
        maxiter: int | None = None,
    ) -> None:
        if not ridge >= 0 or not atol >= 0 or (rtol is not None and not rtol >= 0):
            raise ValueError(f"ridge={ridge}, rtol={rtol}, atol={atol}: none may be negative")
        if maxiter is not None and maxiter < 0:
            raise ValueError(f"maxiter={maxiter}: must not be negative")
        self.name, self.batch_dims, self.ridge, self.x0 = name, batch_dims, ridge, x0
        self.b, self.unravel = ravel(b, batch_dims)
        self.plain = self.flat(matvec)
        self.rtol = 100 * torch.finfo(self.b.dtype).eps if rtol is None else rtol
        self.atol = atol
        self.maxiter = 10 * self.b.shape[-1] if maxiter is None else maxiter
        self.demand(self.b)
        self.size = self.whole  # squared residuals, which the solver keeps up to date

    def demand(self, b: Tensor) -> None:
        """Residuals shall be small beside b."""
        self.whole = dot(b, b)
        self.limit = (self.rtol**2 * self.whole).clamp_min(self.atol**2)

    def flat(self, operator: Operator) -> Callable[[Tensor], Tensor]:
        """`operator` on vectors."""

        def on_vectors(v: Tensor) -> Tensor:
            found = ravel(operator(self.unravel(v)), self.batch_dims)[0].to(v.dtype)
            if found.shape != v.shape:
                raise ValueError(f"matvec: must give a tree like b, got {tuple(found.shape)} for {tuple(v.shape)} in all")
            return found

        return on_vectors

    def product(self, v: Tensor) -> Tensor:
        return self.plain(v) + self.ridge * v if self.ridge else self.plain(v)

    def matrix(self) -> Tensor:
        """A with its ridge, written out: one product for each column."""
        unit = torch.eye(self.b.shape[-1], dtype=self.b.dtype, device=self.b.device)
        return torch.stack([self.product(column.expand_as(self.b)) for column in unit], -1)

    def start(self) -> tuple[Tensor, Tensor]:
        """The first x and its residual."""
        if self.x0 is None:
            return torch.zeros_like(self.b), self.b
        x = ravel(self.x0, self.batch_dims)[0].to(self.b.dtype)
        if x.shape != self.b.shape:
            raise ValueError(f"x0: must be a tree like b, got {tuple(x.shape)} beside {tuple(self.b.shape)} in all")
        return x, self.b - self.product(x)

    def iterations(self) -> Iterator[Tensor]:
        """Which systems are not solved yet by their squared residuals, `size`, as long as there are any."""
        for _ in range(self.maxiter):
            active = self.size > self.limit
            if not bool(active.any()):
                return
            yield active

    def finish(self, x: Tensor) -> Tree:
        """x as a tree, with a warning if its squared residual is no small one."""
        left = torch.where(self.size <= self.limit, 0.0, over(self.size, self.whole)).max().sqrt()
        if not left <= torch.finfo(x.dtype).eps ** 0.5:
            warnings.warn(
                f"{self.name}: after {self.maxiter} steps a residual of {float(left):.1e} of b remains; "
                "more maxiter, a ridge or another solver may help",
                RuntimeWarning,
                stacklevel=3,
            )
        return self.unravel(x)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products along the last dimension, which stays."""
    return (a * b).sum(-1, keepdim=True)


def over(a: Tensor, b: Tensor, where: Tensor | bool = True) -> Tensor:
    """`a / b`, and 0 where b is 0 or `where` is not."""
    use = (b != 0) & where
    return torch.where(use, a / torch.where(use, b, 1.0), 0.0)


__all__ = ["Operator", "System", "dot", "over"]
