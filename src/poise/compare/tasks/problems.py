"""Small problems whose lowest loss is known, so that what is left to it can be told: one file, four classes.

They weigh an optimizer as such. Nothing is held out: both held-out splits measure the objective itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poise.compare.tasks import Split, array_digest
from poise.compare.tasks.digits import pixels

Batch = tuple[Tensor, ...]

BATCH = 64
EVALUATION = 2048


class Convex:
    """Softmax regression on scikit-learn's digits with a ridge: smooth and strongly convex.

        f(W, b) = mean over images of the cross-entropy of W x + b  +  ridge / 2 * (||W||^2 + ||b||^2)

    The optimum is found by L-BFGS in float64, to a gradient below 1e-9.
    """

    name = "convex"
    unit = "nats"
    ridge = 1e-2

    @cached_property
    def data(self) -> Batch:
        images, classes = pixels()
        return torch.from_numpy(images), torch.from_numpy(classes)

    @cached_property
    def fingerprint(self) -> str:
        return array_digest(*(t.numpy() for t in self.data), np.array(self.ridge))

    @cached_property
    def optimum(self) -> float:
        model, batch = nn.Linear(64, 10).double(), (self.data[0].double(), self.data[1])
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        solver = torch.optim.LBFGS(
            model.parameters(), max_iter=2000, tolerance_grad=1e-10, tolerance_change=0.0, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            solver.zero_grad()
            loss = self.loss(model, batch)
            loss.backward()
            return loss

        with torch.enable_grad():
            solver.step(closure)
        return float(self.loss(model, batch).detach())

    def model(self) -> nn.Module:
        return nn.Linear(64, 10)

    def batches(self, split: Split, seed: int) -> Iterator[Batch]:
        if split != "train":
            yield self.data
            return
        for step in range(2**63):
            some = np.random.default_rng((seed, step)).integers(len(self.data[0]), size=BATCH)
            yield self.data[0][some], self.data[1][some]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        penalty = sum((p.square().sum() for p in model.parameters()), torch.zeros(()))
        return F.cross_entropy(model(batch[0]), batch[1]) + self.ridge / 2 * penalty.to(batch[0].device)


class Streamed:
    """A problem whose data are drawn as they are needed, and fitted exactly by the best model: its lowest loss is 0."""

    name: str
    unit = ""
    optimum = 0.0

    @property
    def fingerprint(self) -> str:
        return array_digest(*(t.numpy() for t in self.draw(np.random.default_rng(0), 8)))

    def draw(self, rng: np.random.Generator, count: int) -> Batch:
        """So many examples."""
        raise NotImplementedError

    def batches(self, split: Split, seed: int) -> Iterator[Batch]:
        if split == "train":
            for step in range(2**63):
                yield self.draw(np.random.default_rng((1, seed, step)), BATCH)
        else:
            yield self.draw(np.random.default_rng((2, split == "tune")), EVALUATION)


class IllConditioned(Streamed):
    """Linear regression whose inputs have covariance eigenvalues from 1 to 1e-4, in a random basis.

    f(W) = mean of ||(W - W*) x||^2 / outputs,    x = Q diag(s) z,    z normal,    s^2 evenly spaced in logarithm
    """

    name = "ill-conditioned"
    shape = (32, 64)  # outputs, inputs
    condition = 1e4

    @cached_property
    def truth(self) -> tuple[np.ndarray, np.ndarray]:
        """W*, and the map from z to x."""
        rng = np.random.default_rng(0)
        outputs, inputs = self.shape
        basis = np.linalg.qr(rng.standard_normal((inputs, inputs)))[0]
        scales = np.logspace(0, -np.log10(self.condition) / 2, inputs)
        return rng.standard_normal((outputs, inputs)) / np.sqrt(inputs), basis * scales

    def model(self) -> nn.Module:
        return nn.Linear(*reversed(self.shape), bias=False)

    def draw(self, rng: np.random.Generator, count: int) -> Batch:
        best, spread = self.truth
        x = rng.standard_normal((count, self.shape[1])) @ spread.T
        return torch.from_numpy(x.astype(np.float32)), torch.from_numpy((x @ best.T).astype(np.float32))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()


class NonSmooth(IllConditioned):
    """The same with absolute errors and well-conditioned inputs: no gradient vanishes near the optimum, every step overshoots.

    f(W) = mean of |(W - W*) x|
    """

    name = "non-smooth"
    condition = 1e1

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return (model(batch[0]) - batch[1]).abs().mean()


class Factors(nn.Module):
    """The bilinear form a^T U V^T b of two factors, which start small."""

    def __init__(self, rows: int, columns: int, rank: int) -> None:
        super().__init__()
        self.U = nn.Parameter(0.1 * torch.randn(rows, rank))
        self.V = nn.Parameter(0.1 * torch.randn(columns, rank))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return ((a @ self.U) * (b @ self.V)).sum(-1)


class MatrixRecovery(Streamed):
    """A matrix of rank 3 from random bilinear measurements, with factors of rank 6: not convex, and flat at the optimum.

    f(U, V) = mean of (a^T (U V^T - M*) b)^2,    a, b normal,    ||M*||_F = 1
    """

    name = "matrix-recovery"
    shape = (48, 32)
    rank = 3

    @cached_property
    def truth(self) -> np.ndarray:
        rng = np.random.default_rng(0)
        m = rng.standard_normal((self.shape[0], self.rank)) @ rng.standard_normal((self.rank, self.shape[1]))
        return m / np.linalg.norm(m)

    def model(self) -> nn.Module:
        return Factors(*self.shape, 2 * self.rank)

    def draw(self, rng: np.random.Generator, count: int) -> Batch:
        a, b = rng.standard_normal((count, self.shape[0])), rng.standard_normal((count, self.shape[1]))
        y = np.einsum("ni,ij,nj->n", a, self.truth, b)
        return tuple(torch.from_numpy(t.astype(np.float32)) for t in (a, b, y))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        a, b, y = batch
        return (model(a, b) - y).square().mean()
