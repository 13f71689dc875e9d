"""What one comparison is: the same problem given to poise and to a reference, and how far apart the weights come to stand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

Trajectory = list[list[Tensor]]  # where the weights stand at first, and after every step
Side = Callable[["Problem", Any], Trajectory]

MATRICES = ((12, 8), (8, 12), (10, 10))
MIXED = (*MATRICES, (7,), (6, 4, 3, 3))


@dataclass(frozen=True)
class Problem:
    """Weights and the gradients of every step, which are drawn and also depend, weakly, on the weights.

    `g_t = d r_i c_j n_t + pull * tanh(x)`: sizes of rows and columns differ by `exp(N(0, 1) / 2)`, as they do in networks.

    Attributes:
        shapes, names: of the parameters; names where a method reads them.
        steps, dtype, seed: of the run.
        nudge: the relative size of noise on the gradients of the first step, to see how much a reference makes of rounding.
    """

    shapes: tuple[tuple[int, ...], ...] = MIXED
    names: tuple[str, ...] = ()
    steps: int = 40
    dtype: torch.dtype = torch.float64
    seed: int = 0
    pull: float = 0.3
    nudge: float = 0.0

    def start(self) -> list[Parameter]:
        return [Parameter(w) for w in self._draw(self.seed)]

    def given(self, params: Sequence[Parameter]) -> list[Any]:
        """As an optimizer takes them: with their names where there are any."""
        return list(zip(self.names, params, strict=True)) if self.names else list(params)

    def gradients(self, t: int, weights: Sequence[Tensor]) -> list[Tensor]:
        """Of step t at these weights."""
        scales = self._draw(self.seed + 1)
        drawn = self._draw(self.seed + 2 + t)
        found = []
        for x, n, s in zip(weights, drawn, scales, strict=True):
            across = tuple(range(1, s.ndim))
            rows = s.mean(across, keepdim=True) * s[0].numel() ** 0.5 if across else s
            columns = s.mean(0, keepdim=True) * len(s) ** 0.5 if across else torch.zeros_like(s)
            found.append((0.5 * (rows + columns)).exp() * n + self.pull * x.detach().tanh())
        if t == 0 and self.nudge:
            found = [g * (1 + self.nudge * n) for g, n in zip(found, self._draw(self.seed - 1), strict=True)]
        return found

    def set_gradients(self, t: int, params: Sequence[Parameter]) -> None:
        for p, g in zip(params, self.gradients(t, params), strict=True):
            p.grad = g

    def _draw(self, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype) for shape in self.shapes]


def stepping(make: Callable[[list[Any], Any], Any], closure: bool = False, schedule: bool = False) -> Side:
    """The side of an optimizer: `make(params, options or module)`, then a step for every row of gradients.

    With `closure`, gradients are those at the weights at which the optimizer calls it; with `schedule`, lr falls to nothing.
    """

    def run(problem: Problem, extra: Any) -> Trajectory:
        params = problem.start()
        optimizer = make(problem.given(params), extra)
        found = [copies(params)]
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / problem.steps) if schedule else None
        for t in range(problem.steps):

            def evaluate(t: int = t) -> float:
                problem.set_gradients(t, params)
                return 1.0 + t / 64  # exact in float32, too

            if closure:
                optimizer.step(evaluate)
            else:
                evaluate()
                optimizer.step()
            if falling is not None:
                falling.step()
            found.append(copies(params))
        return found

    return run


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().double().clone() for t in tensors]


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        rule: poise's name of the method.
        source: where the reference is from: a key of `sources.PACKAGES` or `sources.REPOSITORIES`.
        reference: what in it.
        ours, theirs: the two runs, given the options of poise's optimizer and the imported module.
        bound: on the largest relative difference; None where poise follows the paper, or chooses another default, on purpose.
        settings: those that are not defaults, for the reader.
        note: why the difference is what it is, and where the two differ beyond these settings.
        nudge: if not 0, the reference also runs against itself with its first gradients off by so much.
    """

    rule: str
    source: str
    reference: str
    ours: Side
    theirs: Side
    bound: float | None
    settings: str = ""
    note: str = "rounding"
    problem: Problem = field(default_factory=Problem)
    nudge: float = 0.0


@dataclass(frozen=True)
class Absent:
    """A method whose published code cannot be run here, or does not exist: why, and what stands in its place."""

    rule: str
    source: str
    why: str


def difference(ours: Trajectory, theirs: Trajectory) -> float:
    """Over all steps and entries, the largest `|w - w'|`, by the largest `|w' - w'_0|`; infinite where one is no number."""
    if len(ours) != len(theirs) or any(len(a) != len(b) for a, b in zip(ours, theirs, strict=True)):
        raise ValueError(f"{len(ours)} and {len(theirs)} points of {len(ours[0])} and {len(theirs[0])} tensors")
    apart, moved = 0.0, 0.0
    for mine, other in zip(ours, theirs, strict=True):
        for a, b, start in zip(mine, other, theirs[0], strict=True):
            apart = max(apart, _largest(a - b))
            moved = max(moved, _largest(b - start))
    if moved == 0.0:
        raise ValueError("the reference did not move at all")
    return apart / moved


def _largest(t: Tensor) -> float:
    return float(t.abs().nan_to_num(nan=float("inf")).max()) if t.numel() else 0.0
