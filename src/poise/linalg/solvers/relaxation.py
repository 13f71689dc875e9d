"""Successive over-relaxation, and a bandit that learns its parameter from nothing but how long each solve took."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from poise.catalog import Paper, method


@dataclass(frozen=True)
class Solution:
    """Where an iteration ended."""

    x: Tensor
    iterations: int
    residual: float  # ||b - A x|| / ||b - A x_0||: below `tol`, unless the limit came first


def sor(
    A: Tensor, b: Tensor, omega: float = 1.0, x: Tensor | None = None, *, tol: float = 1e-8, limit: int = 10_000
) -> Solution:
    """A x = b by successive over-relaxation: `x <- x + (D / omega + L)^-1 (b - A x)`, A = L + D + L^T.

    Args:
        A: (n, n), dense, without zeros on its diagonal. For positive definite ones it converges for all omega in (0, 2).
        b: (n,).
        omega: 1 is Gauss-Seidel.
        x: where to begin; None: 0.
        tol: stops when the residual is shorter than this share of the first.
        limit: of iterations; whether it came first is told by `residual`.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    r, x = _begin(A, b, omega, x)
    M = A.tril(-1) + torch.diag(A.diagonal() / omega)

    def step(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        x = x + torch.linalg.solve_triangular(M, r[:, None], upper=False)[:, 0]
        return x, b - A @ x

    return _run(step, x, r, tol, limit)


def ssor_pcg(
    A: Tensor, b: Tensor, omega: float = 1.0, x: Tensor | None = None, *, tol: float = 1e-8, limit: int = 10_000
) -> Solution:
    """A x = b by conjugate gradients with `(D + omega L) D^-1 (D + omega L)^T / (omega (2 - omega))` as preconditioner.

    For symmetric positive definite A. Arguments as of `sor`. The released code has the two triangles in the other order, which
    takes as many iterations but for one at most.
    """
    r, x = _begin(A, b, omega, x)
    d = A.diagonal()
    M = omega * A.tril(-1) + torch.diag(d)
    direction, before = torch.zeros_like(r), 1.0

    def step(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal direction, before
        half = torch.linalg.solve_triangular(M, r[:, None], upper=False) * d[:, None]
        z = omega * (2 - omega) * torch.linalg.solve_triangular(M.mT, half, upper=True)[:, 0]
        now = r @ z
        direction = z + (now / before) * direction
        before = now
        image = A @ direction
        alpha = now / (direction @ image)
        return x + alpha * direction, r - alpha * image

    return _run(step, x, r, tol, limit)


def optimal_omega(A: Tensor) -> float:
    """The omega with which `sor` is fastest in the long run: `1 + (beta / (1 + sqrt(1 - beta^2)))^2`.

    beta is the spectral radius of Jacobi's iteration `1 - D^-1 A`. For consistently ordered A, such as grids have.

    Raises:
        ValueError: where Jacobi's iteration does not converge.
    """
    scaled = A / A.diagonal()[:, None]
    beta = float(torch.linalg.eigvals(torch.eye(len(A), dtype=A.dtype, device=A.device) - scaled).abs().max())
    if not beta < 1:
        raise ValueError(f"A: Jacobi's iteration has the spectral radius {beta:.4g}; it must be below 1")
    return 1 + (beta / (1 + math.sqrt(1 - beta**2))) ** 2


@method(
    "learning-to-relax",
    family="linalg",
    kind="solver",
    paper=Paper(
        "Learning to Relax: Setting Solver Parameters Across a Sequence of Linear System Instances",
        arxiv="2310.02246",
        year=2023,
    ),
    mutant=("(cost - self.least) / p", "(cost - self.least)"),
)
class TsallisINF:
    """A bandit that settles on the cheapest of d values over a stream of problems, from the cost of each use alone.

    In round t, with s the mean cost above `least` so far and k the estimated cost of each value:

        eta = 2 / sqrt(t)
        p_i = 4 / (eta (k_i / s - x))^2,    x such that they sum to 1
        i ~ p;   k_i <- k_i + (cost - least) / p_i

        tuner = TsallisINF(torch.linspace(1, 1.95, 20).tolist())
        for A, b in systems:
            found = sor(A, b, tuner.ask())
            tuner.tell(found.iterations)

    Its mean cost approaches that of the best fixed value. Any positive cost will do: iterations of a damped solve, or seconds
    of a block size.

    Args:
        values: what is chosen among; the paper's grid for omega is 20 values in [1, 1.95].
        least: the cost below which none can be: 1, for iterations.
        seed: of the draws, which are functions of it and of the round: asked twice in a round, it answers the same.

    Kept: k, the sum of costs and the round. Source: "Learning to Relax: Setting Solver Parameters Across a Sequence of Linear
    System Instances" (arXiv 2310.02246). The released code looks for x from -1 on, 20 steps, and now and then lands far away;
    here Newton's method starts where it cannot.
    """

    def __init__(self, values: Sequence[float], least: float = 1.0, seed: int = 0) -> None:
        if not len(values):
            raise ValueError(f"values={values}: at least one is needed")
        self.values, self.least, self.seed = list(values), least, seed
        self.round, self.total = 1, 0.0
        self.k = torch.zeros(len(self.values), dtype=torch.float64)
        self._drawn: tuple[int, float] | None = None

    def probabilities(self) -> Tensor:
        """p of this round, (d,) in float64."""
        mean = self.total / (self.round - 1) if self.total else 1.0
        return tsallis_probabilities(self.k / mean, 2 / math.sqrt(self.round))

    def ask(self) -> float:
        """The value to use in this round."""
        return self.values[self._draw()[0]]

    def tell(self, cost: float) -> None:
        """What it cost; ends the round."""
        if not self.least <= cost < math.inf:
            raise ValueError(f"cost={cost}: must be finite and at least {self.least}, which `least` says")
        i, p = self._draw()
        self.k[i] += (cost - self.least) / p
        self.total += cost - self.least
        self.round += 1
        self._drawn = None

    def _draw(self) -> tuple[int, float]:
        """The place of this round's value, and its probability."""
        if self._drawn is None:
            p = self.probabilities()
            u = random.Random(f"{self.seed}:{self.round}").random()
            i = min(int((p.cumsum(0) <= u).sum()), len(p) - 1)
            self._drawn = i, float(p[i])
        return self._drawn


class ContextualTsallisINF:
    """A `TsallisINF` for each part of an interval in which a number lies that is known of each problem beforehand.

        tuner = ContextualTsallisINF(values, low=-0.15, high=0.65)
        found = sor(A + c * I, b, tuner.ask(c))
        tuner.tell(c, found.iterations)

    Args:
        values, least, seed: see `TsallisINF`.
        low, high: the interval; what lies outside belongs to its last part.
        bins: parts, of equal length; 5.
    """

    def __init__(
        self, values: Sequence[float], low: float, high: float, bins: int = 5, *, least: float = 1.0, seed: int = 0
    ) -> None:
        if bins < 1 or not low < high:
            raise ValueError(f"low={low}, high={high}, bins={bins}: at least one part of an interval is needed")
        self.low, self.high = low, high
        self.tuners = [TsallisINF(values, least, seed * bins + number) for number in range(bins)]

    def tuner(self, context: float) -> TsallisINF:
        """The one whose part the context lies in."""
        place = math.floor((context - self.low) / (self.high - self.low) * len(self.tuners))
        return self.tuners[min(max(place, 0), len(self.tuners) - 1)]

    def ask(self, context: float) -> float:
        """The value to use."""
        return self.tuner(context).ask()

    def tell(self, context: float, cost: float) -> None:
        """What it cost."""
        self.tuner(context).tell(cost)


def tsallis_probabilities(k: Tensor, eta: float) -> Tensor:
    """`p_i = 4 / (eta (k_i - x))^2` with the x below all k for which they sum to 1.

    By Newton's method from x = min k - 2 / eta, where the smallest alone has p = 1: the sum grows with x and is convex, so that
    from above its root every step stays above it.
    """
    gaps, below = (k - k.min()).double().numpy(), 2 / eta  # x = min k - below
    p = 4 / (eta * (gaps + below)) ** 2
    for _ in range(100):
        excess = p.sum() - 1
        if excess < 1e-14:
            break
        below += excess / (eta * (p * p**0.5).sum())
        p = 4 / (eta * (gaps + below)) ** 2
    return torch.from_numpy(p)


def _begin(A: Tensor, b: Tensor, omega: float, x: Tensor | None) -> tuple[Tensor, Tensor]:
    """The first residual, and where it was taken."""
    n = len(b)
    for name, tensor, shape in (("A", A, (n, n)), ("b", b, (n,)), ("x", x, (n,))):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)} does not fit; it must be {shape}")
    if not 0 < omega < 2:
        raise ValueError(f"omega={omega}: must be in (0, 2)")
    if not bool((A.diagonal() != 0).all()):
        raise ValueError("A: its diagonal must not have zeros")
    return (b, torch.zeros_like(b)) if x is None else (b - A @ x, x)


def _run(step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], x: Tensor, r: Tensor, tol: float, limit: int) -> Solution:
    first = float(torch.linalg.vector_norm(r))
    share, count = (1.0, 0) if first else (0.0, 0)
    while share >= tol and count < limit:
        x, r = step(x, r)
        count += 1
        share = float(torch.linalg.vector_norm(r)) / first
    return Solution(x, count, share)
