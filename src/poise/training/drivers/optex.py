"""OptEx: steps ahead on predicted gradients, so that the true ones can be taken at several points at once."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from poise.catalog import Paper, choice, log_uniform, method
from poise.linalg.gaussian_process import best_length_scale, matern52, regression_weights, squared_distances

from .. import keeping, weights
from ..driver import Driver
from ..passes import Passes

Select = Literal["last", "min_loss", "min_grad_norm"]
Pair = list[tuple[Tensor, Tensor | None]]  # for each parameter a weight and its gradient


@method(
    "optex",
    family="training",
    kind="driver",
    paper=Paper("OptEx: Expediting First-Order Optimization with Approximately Parallelized Iterations", year=2024),
    tune={"parallelism": choice(2, 4, 8), "length_scale": log_uniform(0.1, 100.0)},
    mutant=("i < self.parallelism - 1", "i < self.parallelism"),
)
class OptEx(Driver):
    """The inner optimizer, N steps at a time: all but the last on gradients predicted from those seen before.

    With the last T pairs X, Y of weights and gradients, a Matern 5/2 kernel k, and s the mean of sqrt(||x||) over X:

        mu(x) = k(x / s, X / s) (k(X / s, X / s) + noise I)^-1 Y,    0 as long as there are fewer than 2 pairs
        x_0 = x,   x_{i+1} = one step of the inner optimizer from x_i, with mu(x_i)       i = 0 ... N - 2
        g_i = grad f(x_i), at all N points                                              independent: N workers, one wait
        x <- one step of the inner optimizer from the selected x_i, with its state there and g_i
        the N pairs (x_i, g_i) take the place of the oldest

    Here the N passes are taken one after the other: this shows what N workers would gain, which the paper puts at sqrt(N) times
    fewer steps. The prediction is of one function, so give the closure the same data in every step, or large batches.

    Weights and state are at last those of the selected x_i and one step more, as if the virtual steps to others had not been
    taken; where a closure fails they are those before the step. All passes draw the same random numbers, and the buffers of
    `model` are left as the first one made them.

    Args:
        opt: any optimizer that takes gradients as they are. Its schedules see N of its own steps in one.
        parallelism: N, 4; published runs have 4 to 10. 1 is the inner optimizer.
        history: T, 50.
        length_scale: of the kernel, in units of s: 0.1, the published default, with which hardly more than the nearest gradient
            is repeated. Several: each step takes the one which best predicts the newest N gradients from those before.
        noise: 1e-3, the variance of gradients in units of the kernel.
        normalize: whether weights are divided by s. Without, `length_scale` is in units of the weights.
        coordinates: how many weights, drawn anew for each step, distances are measured in. None: all.
        select: "last"; "min_loss" or "min_grad_norm", of the true loss or gradient at x_i.
        seed: of the coordinates drawn.
        model: whose buffers (batch statistics) only the first pass may change. None: there are none.

    The returned loss is that at x_0. A step of N > 1 holds a copy of weights and state, two for a `select` other than "last".
    State: 2 T values per parameter, 100, and counts. Source: "OptEx: Expediting First-Order Optimization with Approximately
    Parallelized Iterations" (NeurIPS 2024). Its JAX code is followed; that in PyTorch never uses the prediction. "min_loss" is
    what that file has as a comment and, in a baseline, in use: the loss is that of x_i, where the gradient is taken.
    """

    needs_closure = True
    gives_gradients = True

    def __init__(
        self,
        opt: torch.optim.Optimizer,
        parallelism: int = 4,
        history: int = 50,
        length_scale: float | Sequence[float] = 0.1,
        *,
        noise: float = 1e-3,
        normalize: bool = True,
        coordinates: int | None = None,
        select: Select = "last",
        seed: int = 0,
        model: nn.Module | None = None,
    ) -> None:
        grid = list(length_scale) if isinstance(length_scale, Sequence) else [length_scale]
        if parallelism < 1:
            raise ValueError(f"parallelism={parallelism}: must be at least 1")
        if history < max(2, parallelism):
            raise ValueError(f"history={history}: must be at least 2, and hold the {parallelism} pairs of a step")
        if not grid or not all(value > 0 for value in grid):
            raise ValueError(f"length_scale={length_scale}: must be positive, one number or several")
        if not noise > 0:
            raise ValueError(f"noise={noise}: must be positive; the first step sees one point several times")
        if coordinates is not None and coordinates < 1:
            raise ValueError(f"coordinates={coordinates}: must be at least 1, or None for all")
        if select not in get_args(Select):
            raise ValueError(f"select={select!r}: must be one of {', '.join(get_args(Select))}")
        self.parallelism, self.history, self.grid, self.noise = parallelism, history, grid, noise
        self.normalize, self.coordinates, self.select, self.seed, self.model = normalize, coordinates, select, seed, model
        super().__init__(opt, own={"step": 0, "count": 0, "x": [], "g": []})

    def adopt(self, params: Sequence[Tensor]) -> None:
        for p in params:  # one that is added later counts as having stood where it stands, without a gradient
            x = weights.read(self, p)
            self.own["x"].append(x.expand(self.history, *x.shape).clone())
            self.own["g"].append(torch.zeros_like(self.own["x"][-1]))

    def drive(self, closure: Callable[[], Any] | None) -> Any:
        assert closure is not None
        before = keeping.snapshot(self.inner, state=True, params=True) if self.parallelism > 1 else None
        try:
            losses, pairs = self._roll(Passes(self, closure, self.model))
        except BaseException:
            if before is not None:
                keeping.restore(self.inner, before)
            raise
        self._remember(pairs)
        self.own["step"] += 1
        return losses[0]

    @torch.no_grad()
    def predict(self, point: Sequence[Tensor]) -> list[Tensor]:
        """The gradients that are predicted at weights in the order of the groups."""
        return list(self._fitted()(point))

    def _roll(self, passes: Passes) -> tuple[list[Any], list[Pair]]:
        """To all N points, and the true step from the selected one; returns the losses and pairs found on the way."""
        predict = self._fitted() if self.parallelism > 1 else list
        losses: list[Any] = []
        pairs: list[Pair] = []
        least: float | None = None
        chosen: Any = None
        for i in range(self.parallelism):
            losses.append(passes.elsewhere(passes.closure) if i else passes.here())
            pairs.append(self._pair())
            if self.select != "last":
                value = float(losses[i]) if self.select == "min_loss" else float(weights.norm(self._gradients()))
                if least is None or value < least:
                    taken = keeping.snapshot(self.inner, state=True, params=True)
                    least, chosen = value, (losses[i], taken, [p.grad for p in self.parameters()])
            if i < self.parallelism - 1:
                for p, value in zip(self.parameters(), predict([x for x, _ in pairs[i]]), strict=True):
                    if p.grad is not None:
                        p.grad = torch.empty_like(p.grad)
                        weights.local(p.grad).copy_(value)
                self.inner_step(lambda loss=losses[i]: loss)
        loss = losses[-1]
        if chosen is not None:
            loss, taken, grads = chosen
            keeping.restore(self.inner, taken)
            for p, grad in zip(self.parameters(), grads, strict=True):
                p.grad = grad
        self.inner_step(lambda: loss)
        return losses, pairs

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters() if p.grad is not None]

    def _pair(self) -> Pair:
        """Copies of every weight and of the gradient that stands in it."""
        xs = [weights.read(self, p).clone() for p in self.parameters()]
        gs = [p.grad for p in self.parameters()]
        return [(x, None if g is None else weights.local(g).to(x.dtype, copy=True)) for x, g in zip(xs, gs, strict=True)]

    def _remember(self, pairs: list[Pair]) -> None:
        for pair in pairs:
            place = self.own["count"] % self.history
            for (x, g), X, G in zip(pair, self.own["x"], self.own["g"], strict=True):
                X[place] = x
                G[place] = 0.0 if g is None else g
            self.own["count"] += 1

    def _fitted(self) -> Callable[[Sequence[Tensor]], Iterable[Tensor]]:
        """mu, from weights to gradients, one after the other in the order of the groups."""
        count = self.own["count"]
        n = min(count, self.history)
        if n < 2:
            return lambda point: (torch.zeros_like(x) for x in point)
        params, places = self.parameters(), self._places()
        X = [self._seen(x[:n], at) for x, at in zip(self.own["x"], places, strict=True)]
        G = [self._seen(g[:n], None) for g in self.own["g"]]
        known = weights.added((p, squared_distances(x, x).double()) for p, x in zip(params, X, strict=True))
        unit = 1.0
        if self.normalize:
            lengths = weights.added((p, x.double().square().sum(1)) for p, x in zip(params, X, strict=True)).sqrt()
            unit = float(lengths.sqrt().mean()) or 1.0
        known = known / unit**2
        length_scale = self.grid[0]
        older = n - self.parallelism
        if len(self.grid) > 1 and older > 0:
            order = (torch.arange(n, device=known.device) + count) % n  # the oldest first
            gram = weights.added((p, (g @ g.mT).double()) for p, g in zip(params, G, strict=True))[order][:, order]
            between = known[order][:, order]
            length_scale = best_length_scale(between[:older, :older], between[older:, :older], gram, self.grid, self.noise)
        kernel = matern52(known, length_scale)

        def predict(point: Sequence[Tensor]) -> Iterable[Tensor]:
            new = [self._seen(x[None], at) for x, at in zip(point, places, strict=True)]
            squares = weights.added((p, squared_distances(a, b).double()) for p, a, b in zip(params, new, X, strict=True))
            w = regression_weights(kernel, matern52(squares / unit**2, length_scale), self.noise)
            return ((w.to(g) @ g).reshape(x.shape) for g, x in zip(G, point, strict=True))

        return predict

    def _places(self) -> list[Tensor | None]:
        """For each parameter the places in it that distances are measured in; None: all."""
        sizes = [x[0].numel() for x in self.own["x"]]
        if self.coordinates is None or self.coordinates >= sum(sizes):
            return [None] * len(sizes)
        drawn = torch.tensor(
            sorted(random.Random(f"{self.seed}:{self.own['count']}").sample(range(sum(sizes)), self.coordinates))
        )
        found: list[Tensor | None] = []
        begin = 0
        for size, x in zip(sizes, self.own["x"], strict=True):
            found.append((drawn[(drawn >= begin) & (drawn < begin + size)] - begin).to(x.device))
            begin += size
        return found

    @staticmethod
    def _seen(rows: Tensor, at: Tensor | None) -> Tensor:
        flat = rows.reshape(len(rows), math.prod(rows.shape[1:]))
        return flat if at is None else flat[:, at]
