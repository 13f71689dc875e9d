"""Optimised linear merging: the weights of a soup of many checkpoints, searched for against a score."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor

from poise.catalog import Paper, method

from ..soup import Soup

Signs = Literal["any", "nonnegative"]
Scores = float | Mapping[str, float]
Evaluate = Callable[[Soup], Scores]


@dataclass(frozen=True)
class Point:
    """One merge that was evaluated.

    Attributes:
        alpha: weights, of sum 1.
        scores: of every task; a single score stands under "score".
        kind: "single", "uniform", "greedy" or "search".
    """

    alpha: tuple[float, ...]
    scores: Mapping[str, float]
    kind: str

    @property
    def score(self) -> float:
        """The mean over tasks, which is what is maximized; minus infinity where one is NaN."""
        mean = sum(self.scores.values()) / len(self.scores)
        return mean if not math.isnan(mean) else -math.inf

    def dominates(self, other: Point) -> bool:
        """At least as good at every task, and better at one."""
        pairs = [(self.scores[task], other.scores[task]) for task in self.scores]
        return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


@dataclass(frozen=True)
class Recycled:
    """What was found.

    Attributes:
        best: the best merge of all that were evaluated, baselines among them.
        points: all that were evaluated, in order, each once.
    """

    best: Point
    points: tuple[Point, ...]

    def best_of(self, kind: str) -> Point:
        """The best "single", "uniform", "greedy" or "search" one."""
        return max((p for p in self.points if p.kind == kind), key=lambda p: p.score)

    def pareto(self) -> list[Point]:
        """Those that no other one dominates."""
        return [p for p in self.points if not any(other.dominates(p) for other in self.points)]


@method(
    "optimised_linear",
    family="merge",
    kind="solver",
    paper=Paper("If You Can't Use Them, Recycle Them", arxiv="2412.04144", year=2024),
    mutant=("-points.score(alpha)", "points.score(alpha)"),
)
def optimise_linear(
    models: Sequence[Mapping[str, Tensor]],
    evaluate: Evaluate,
    *,
    budget: int = 100,
    sigma: float | None = None,
    population: int | None = None,
    signs: Signs = "any",
    greedy: bool = True,
    cache: dict[tuple[float, ...], Scores] | None = None,
    seed: int = 0,
) -> Recycled:
    """The linear soup with the best mean score over tasks, by CMA-ES over its weights.

        theta(alpha) = sum_i alpha_i theta_i,   alpha = a / sum_i a_i;   maximize over a: mean over tasks of score(theta(alpha))

    First every model alone, the uniform soup and the greedy one (models from the best down, each kept unless the score falls)
    are evaluated; the search starts at the uniform one, and what is returned is never worse than any of them.

    Args:
        models: state dicts or checkpoints of one architecture, at least two.
        evaluate: given theta(alpha), a `Soup`, a mapping whose tensors are made as they are read (`soup.into(module)` writes
            them into a module, one at a time): a score, higher being better, or one for each task by name. NaN counts as the
            worst.
        budget: evaluations in all, 100; baselines count. The search stops before a generation that would exceed it.
        sigma: first step size, 0.5 / n.
        population: of a generation, 4 + floor(3 ln n).
        signs: "any" (default) or "nonnegative": |a| is taken.
        greedy: evaluate the greedy soup, up to n evaluations.
        cache: weights to scores that are known already; what is evaluated is added. Weights are compared to 12 decimals.
        seed: 0.

    Raises:
        ImportError: the package `cmaes` is missing (the extra `evolve`).
        ValueError: fewer than two models, a budget below that of the baselines, tasks that change from call to call.

    How the paper normalizes, and its step size and budget, are not published; the defaults are ours. Source: "If You Can't Use
    Them, Recycle Them" (arXiv 2412.04144); the search is that of "The CMA Evolution Strategy: A Tutorial" (arXiv 1604.00772).
    """
    count = len(models)
    if count < 2:
        raise ValueError(f"models: {count} given, at least two are needed")
    if signs not in get_args(Signs):
        raise ValueError(f"signs={signs!r}: must be 'any' or 'nonnegative'")
    if budget < count + 1:
        raise ValueError(f"budget={budget}: the {count} models and their mean take {count + 1} evaluations alone")
    cmaes = _cmaes()
    points = _Points(models, evaluate, {} if cache is None else cache, budget)
    alone = [points.score(_one_hot([i], count), "single") for i in range(count)]
    points.score((1 / count,) * count, "uniform")
    if greedy:
        _greedy(points, alone, count)
    search = cmaes.CMA(
        mean=np.full(count, 1 / count), sigma=0.5 / count if sigma is None else sigma, population_size=population, seed=seed
    )
    while points.left >= search.population_size:
        told = []
        for _ in range(search.population_size):
            a = search.ask()
            alpha = _normalized(a, signs)
            told.append((a, math.inf if alpha is None else -points.score(alpha)))
        search.tell(told)
    return Recycled(max(points.found.values(), key=lambda p: p.score), tuple(points.found.values()))


class _Points:
    """Evaluations, each weight vector once."""

    def __init__(
        self, models: Sequence[Mapping[str, Tensor]], evaluate: Evaluate, cache: dict[Any, Scores], budget: int
    ) -> None:
        self.models, self.evaluate, self.cache, self.budget = models, evaluate, cache, budget
        self.found: dict[tuple[float, ...], Point] = {}
        self.asked = 0

    @property
    def left(self) -> int:
        return self.budget - self.asked

    def score(self, alpha: tuple[float, ...], kind: str = "search") -> float:
        self.asked += 1
        key = tuple(round(a, 12) for a in alpha)
        if key not in self.found:
            if key not in self.cache:
                self.cache[key] = self.evaluate(Soup(self.models, alpha))
            scores = self.cache[key]
            named = dict(scores) if isinstance(scores, Mapping) else {"score": float(scores)}
            known = next(iter(self.found.values()), None)
            if not named or (known is not None and set(named) != set(known.scores)):
                raise ValueError(
                    f"evaluate: returned scores of {sorted(named)}; there must be some, of the same tasks every time"
                )
            self.found[key] = Point(alpha, named, kind)
        return self.found[key].score


def _greedy(points: _Points, alone: Sequence[float], count: int) -> None:
    order = sorted(range(count), key=lambda i: -alone[i])
    chosen, best = order[:1], alone[order[0]]
    for i in order[1:]:
        if not points.left:
            return
        score = points.score(_one_hot([*chosen, i], count), "greedy")
        if score >= best:
            chosen, best = [*chosen, i], score


def _one_hot(chosen: Iterable[int], count: int) -> tuple[float, ...]:
    picked = set(chosen)
    return tuple(1 / len(picked) if i in picked else 0.0 for i in range(count))


def _normalized(a: Any, signs: Signs) -> tuple[float, ...] | None:
    """Divided by their sum; None where that is too small to divide by."""
    a = np.abs(a) if signs == "nonnegative" else a
    total = float(np.sum(a))
    if abs(total) < 1e-3 * float(np.sum(np.abs(a))) or total == 0:
        return None
    return tuple((a / total).tolist())


def _cmaes() -> Any:
    try:
        return importlib.import_module("cmaes")
    except ModuleNotFoundError as error:
        raise ImportError('optimised linear merging needs the package cmaes: pip install "poise[evolve]"') from error
