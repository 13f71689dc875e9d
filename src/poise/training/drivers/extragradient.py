"""Extragradient on two timescales: for `min over x, max over y`, a step with the gradients found a step ahead."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from poise.catalog import Paper, log_uniform, method

from .. import keeping
from ..driver import Driver
from ..passes import Passes

PAPER = Paper("Two-timescale Extragradient for Finding Local Minimax Points", arxiv="2305.16242", year=2023)


@method(
    "extragradient",
    family="training",
    kind="driver",
    paper=PAPER,
    tune={"tau": log_uniform(1.0, 100.0)},
    mutant=("keeping.restore(self.inner, before)", "pass"),
)
class Extragradient(Driver):
    """Extragradient on two timescales, for `min over x, max over y of f(x, y)`.

    With z = (x, y) and F(z) = (df/dx, -df/dy), around gradient descent:

        z' = z - lr Lambda F(z),    Lambda = diag(I / tau, I)
        z <- z - lr Lambda F(z')

    Both steps are the inner optimizer's, from the same weights and the same state, so that around Adam or Muon z' is where that
    would go. What it keeps is of the second one. tau = 1 is the extragradient method, and with `extrapolation=0` too it is
    simultaneous descent and ascent, which circles outwards where f is `x y`. A large tau, which slows the minimiser, makes of
    the points that attract this method the local minimax points, also those with a degenerate d2f/dy2, at which descent and
    ascent on two timescales fail; `local_minimax` tests a point.

        opt = Extragradient(Adam([{"params": generator.parameters()}, {"params": critic.parameters()}]), critic, tau=10)
        opt.step(closure)    # the closure's loss is f; the signs are turned here

    Both gradients are of the same batch and the same function: torch's random numbers are drawn again for the second pass, and
    the buffers of `model` are left as the first one made them. Two passes a step.

    Args:
        opt: the inner optimizer. Each of its groups is of one player, because it is `lr` that is divided by tau.
        maximiser: the module or the tensors that maximise. In the groups it is `player`, "min" or "max", which may be set for
            groups added later. None: everything minimises, as where the other player is in the loss.
        tau: of the groups that minimise, 10; at least 1. There is no rule to choose it: double it while the length of the
            gradient swings instead of falling. The paper's condition on the rate is lr < 1 / L, L the Lipschitz constant of F.
        extrapolation: how far z' is ahead, in steps: 1, per group. 0 for all groups: one pass, descent and ascent.
        model: whose buffers (batch statistics) only the first pass may change. None: there are none.

    Raises:
        ValueError: if a group has parameters of both players, or torch's `maximize`, which would turn the sign once more.

    State: a count; a copy of weights and state during a step. Source: "Two-timescale Extragradient for Finding Local Minimax
    Points" (arXiv 2305.16242), for gradient descent inside; no code of the authors was found.
    """

    needs_closure = True
    gives_gradients = True

    def __init__(
        self,
        opt: torch.optim.Optimizer,
        maximiser: nn.Module | Iterable[Tensor] | None = None,
        tau: float = 10.0,
        extrapolation: float = 1.0,
        *,
        model: nn.Module | None = None,
    ) -> None:
        if not tau >= 1.0:
            raise ValueError(f"tau={tau}: must be at least 1; it is the minimiser that is slowed")
        if not extrapolation >= 0.0:
            raise ValueError(f"extrapolation={extrapolation}: must not be negative")
        self.model = model
        super().__init__(opt, {"tau": tau, "extrapolation": extrapolation, "player": "min"}, own={"step": 0})
        up = {id(p) for p in (maximiser.parameters() if isinstance(maximiser, nn.Module) else maximiser or ())}
        for number, group in enumerate(self.param_groups):
            rising = [id(p) in up for p in group["params"]]
            if any(rising) and not all(rising):
                raise ValueError(
                    f"opt: group {number} has parameters of both players; build the optimizer with groups of their own, "
                    'as in [{"params": generator.parameters()}, {"params": critic.parameters()}]'
                )
            if any(rising):
                group[self._keys["player"]] = "max"
        missing = len(up - {id(p) for p in self.parameters()})
        if missing:
            raise ValueError(f"maximiser: {missing} of its tensors are not in the optimizer")
        self._check()

    def drive(self, closure: Callable[[], Any] | None) -> Any:
        assert closure is not None
        self._check()
        passes = Passes(self, closure, self.model)
        loss = passes.here()
        if any(self.hyper(group, "extrapolation") for group in self.param_groups):
            before = keeping.snapshot(self.inner, state=True, params=True)
            try:
                self._move(loss, ahead=True)
                passes.elsewhere(closure)
            finally:
                keeping.restore(self.inner, before)
        self._move(loss)
        self.own["step"] += 1
        return loss

    def _move(self, loss: Any, *, ahead: bool = False) -> None:
        """A step of the inner optimizer, down for one player and up for the other, the minimiser's divided by tau."""
        with self._turned(), self._slowed(ahead):
            self.inner_step(lambda: loss)

    @contextmanager
    def _turned(self) -> Iterator[None]:
        """Within it, the maximiser's gradients have the other sign."""
        rising = [p for group in self.param_groups if self.hyper(group, "player") == "max" for p in group["params"]]
        held = [p.grad for p in rising]
        try:
            for p, grad in zip(rising, held, strict=True):
                p.grad = None if grad is None else grad.neg()
            yield
        finally:
            for p, grad in zip(rising, held, strict=True):
                p.grad = grad

    @contextmanager
    def _slowed(self, ahead: bool) -> Iterator[None]:
        """Within it, the rates of the groups are those of a step, or of the step ahead."""
        held = [group["lr"] for group in self.param_groups]
        try:
            for group in self.param_groups:
                share = self.hyper(group, "extrapolation") if ahead else 1.0
                if self.hyper(group, "player") == "min":
                    share /= self.hyper(group, "tau")
                if share != 1.0:
                    group["lr"] = group["lr"] * share
            yield
        finally:
            for group, lr in zip(self.param_groups, held, strict=True):
                group["lr"] = lr

    def _check(self) -> None:
        """Groups may have been added, or changed by hand."""
        for number, group in enumerate(self.param_groups):
            player = self.hyper(group, "player")
            if player not in ("min", "max"):
                raise ValueError(f"player={player!r} in group {number}: must be 'min' or 'max'")
            if group.get("maximize"):
                raise ValueError(f"maximize=True in group {number}: the signs of both players are turned here; leave it out")


@dataclass(frozen=True)
class LocalMinimax:
    """What the second derivatives say of a stationary point."""

    inner: float  # the largest eigenvalue of B: above 0, and y is not at a maximum
    outer: float  # the smallest of the restricted Schur complement: below 0, and x can do better; inf where U is empty
    necessary: bool  # whether both allow a local minimax point


@method(
    "local-minimax",
    family="training",
    kind="diagnostic",
    paper=PAPER,
    mutant=("C @ blind", "C @ V"),
)
def local_minimax(A: Tensor, B: Tensor, C: Tensor, tolerance: float | None = None) -> LocalMinimax:
    """Whether a stationary point of f(x, y) may be a local minimax point, by its second derivatives.

    With A = d2f/dx2, B = d2f/dy2, C = d2f/dxdy, every local minimax point has

        B <= 0   and   U^T (A - C B^+ C^T) U >= 0,    U an orthonormal basis of {x : C^T x in range(B)}

    A direction of x outside U gives f a slope where it is flat in y: y then gains at first order, and x loses whatever A is.
    Where B is invertible, U is everything, and this the condition on the Schur complement; where B = 0 and C has full rank, U
    is empty and every A will do. Points that fail are avoided by `Extragradient` for almost all starts, once tau is large.

        (A, C), (_, B) = torch.func.hessian(f, (0, 1))(x, y)

    Args:
        A: (n, n). B: (m, m). C: (n, m). Their symmetric parts are used.
        tolerance: eigenvalues and singular values below this share of the largest of all three matrices count as 0: by default
            their size times the rounding of their dtype.

    Raises:
        ValueError: for shapes that do not fit.

    Source: "Two-timescale Extragradient for Finding Local Minimax Points" (arXiv 2305.16242).
    """
    n, m = A.shape[-1], B.shape[-1]
    for name, matrix, shape in (("A", A, (n, n)), ("B", B, (m, m)), ("C", C, (n, m))):
        if tuple(matrix.shape) != shape or 0 in shape:
            raise ValueError(f"{name}: shape {tuple(matrix.shape)} does not fit; A is (n, n), B (m, m), C (n, m)")
    share = (n + m) * torch.finfo(A.dtype).eps if tolerance is None else tolerance
    zero = share * max(float(torch.linalg.matrix_norm(M, 2)) for M in (A, B, C))
    values, V = torch.linalg.eigh((B + B.mT) / 2)
    seen, blind = V[:, values.abs() > zero], V[:, values.abs() <= zero]
    # the left singular vectors of C N, N spanning the null space of B, that it maps to 0
    left, sigma, _ = torch.linalg.svd(C @ blind, full_matrices=True)
    U = left[:, int((sigma > zero).sum()) :]
    weak = C @ seen
    S = U.mT @ ((A + A.mT) / 2 - weak / values[values.abs() > zero] @ weak.mT) @ U
    inner = float(values[-1])
    outer = float(torch.linalg.eigvalsh(S)[0]) if U.shape[1] else math.inf
    return LocalMinimax(inner, outer, inner <= zero and outer >= -zero)
