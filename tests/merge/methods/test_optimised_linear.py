"""Optimised linear merging (If You Can't Use Them, Recycle Them, arXiv 2412.04144)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from conformance.cases import mutated
from merge.cutting import family, largest_gap, same
from torch import nn

from poise import catalog
from poise.merge import merge_tensors
from poise.merge.methods.linear import linear
from poise.merge.methods.optimised_linear import Point, Recycled, optimise_linear
from poise.merge.soup import Soup

COUNT = 8
GOAL = np.array([0.35, -0.1, 0.2, 0.05, 0.3, 0.0, 0.15, 0.05])  # sums to 1
HALF = np.random.default_rng(1).standard_normal((COUNT, COUNT))
CURVATURE = HALF @ HALF.T + 0.3 * np.eye(COUNT)
POINTS = [{"alpha": torch.eye(COUNT)[i]} for i in range(COUNT)]  # theta(alpha) is alpha


def quadratic(soup: Any) -> float:
    off = soup["alpha"].double().numpy() - GOAL
    return -float(off @ CURVATURE @ off)


def searched(budget: int = 800, **settings: Any) -> Recycled:
    return optimise_linear(POINTS, quadratic, budget=budget, **settings)


def test_one_model_alone_is_that_model_and_equal_weights_are_the_mean() -> None:
    _, models = family(3)
    assert same({**Soup(models, (0.0, 1.0, 0.0)), "steps": models[1]["steps"]}, models[1])
    mean = Soup(models, (1 / 3,) * 3)
    assert same(dict(mean), merge_tensors(linear, models))


def test_the_optimum_of_a_quadratic_is_found_and_random_search_does_not_find_it() -> None:
    found = searched()
    assert len(found.points) <= 800
    assert np.abs(np.array(found.best.alpha) - GOAL).max() < 1e-2
    assert sum(found.best.alpha) == pytest.approx(1)
    draws = np.random.default_rng(0).normal(1 / COUNT, 0.5 / COUNT, (800, COUNT))
    best = max(quadratic({"alpha": torch.from_numpy(a / a.sum())}) for a in draws)
    assert found.best.score > 0.01 * best  # both below 0


def test_its_test_tells_it_from_its_mutant() -> None:
    wrong = mutated(catalog.get("optimised_linear"))(POINTS, quadratic, budget=800)
    assert np.abs(np.array(wrong.best.alpha) - GOAL).max() > 0.05


def test_where_tasks_conflict_no_parent_and_no_mean_is_better_at_both() -> None:
    """Four checkpoints on a line between two tasks' optima, each with an error of its own that merging cancels."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.randn(2, 12, generator=generator)
    means = [(1 - share) * ends[0] + share * ends[1] for share in (0.0, 0.2, 0.6, 1.0)]
    models = [{"w": mean + 0.8 * torch.randn(12, generator=generator)} for mean in means]

    def scores(soup: Any) -> dict[str, float]:
        return {f"task {i}": -float((soup["w"] - end).square().sum()) for i, end in enumerate(ends)}

    found = optimise_linear(models, scores, budget=200)
    others = [p for p in found.points if p.kind in ("single", "uniform")]
    assert len(others) == 5
    assert not any(other.dominates(found.best) for other in others)
    assert found.best in found.pareto() and found.best.score > max(o.score for o in others) + 0.1
    assert all(not q.dominates(p) for p in found.pareto() for q in found.points)


@pytest.mark.parametrize("budget", [9, 12, 40])
def test_it_is_never_worse_than_the_best_baseline(budget: int) -> None:
    """On a score without any structure, and with a step size that leads nowhere."""
    calls = []

    def noise(soup: Any) -> float:
        calls.append(1)
        return math.sin(1e4 * float((soup["alpha"] * torch.arange(1, 9)).sum()))

    found = optimise_linear(POINTS, noise, budget=budget, sigma=100.0)
    assert len(calls) <= budget and len(found.points) == len(calls)
    assert found.best.score == max(p.score for p in found.points)
    assert [p.kind for p in found.points[:9]] == ["single"] * 8 + ["uniform"]


def test_the_greedy_soup_grows_while_the_score_does_not_fall() -> None:
    goal = torch.tensor([0.4, 0.0, 0.35, 0.25])
    models = [{"w": torch.eye(4)[i]} for i in range(4)]
    found = optimise_linear(models, lambda soup: -float((soup["w"] - goal).abs().sum()), budget=8)
    # in the order of their own scores; the second one, which comes last, would make the uniform mean, and lowers the score
    assert [p.alpha for p in found.points if p.kind == "greedy"] == [(0.5, 0, 0.5, 0), (1 / 3, 0, 1 / 3, 1 / 3)]
    assert found.best_of("greedy").score > found.best_of("uniform").score


def test_scores_that_are_known_are_not_asked_for_again() -> None:
    cache: dict[Any, Any] = {}
    first = searched(60, cache=cache)

    def unexpected(soup: Any) -> float:
        raise AssertionError("asked for")

    again = optimise_linear(POINTS, unexpected, budget=60, cache=cache)
    assert again == first and len(cache) == len(first.points)


def test_the_seed_decides() -> None:
    assert searched(60) == searched(60)
    assert searched(60, seed=1).points != searched(60).points


def test_weights_may_be_kept_from_being_negative() -> None:
    found = searched(400, signs="nonnegative")
    assert min(min(p.alpha) for p in found.points) >= 0
    assert min(searched(400).best.alpha) < -0.05


def test_a_score_that_is_nan_is_the_worst() -> None:
    found = optimise_linear(POINTS, lambda soup: math.nan if float(soup["alpha"][0]) < 0.3 else quadratic(soup), budget=100)
    assert found.best.alpha[0] >= 0.3 and math.isfinite(found.best.score)


def test_theta_is_made_a_tensor_at_a_time_and_written_into_a_module() -> None:
    nets = [nn.Linear(3, 2), nn.Linear(3, 2)]
    read: list[str] = []

    class Watched(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            read.append(name)
            return super().__getitem__(name)

    soup = Soup([Watched(net.state_dict()) for net in nets], (0.5, 0.5))
    assert not read
    target = soup.into(nn.Linear(3, 2))
    assert read == ["weight"] * 3 + ["bias"] * 3
    mean = merge_tensors(linear, [net.state_dict() for net in nets])
    assert largest_gap(target.state_dict(), mean) == 0


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="1 given, at least two"):
        optimise_linear(POINTS[:1], quadratic)
    with pytest.raises(ValueError, match="budget=8: the 8 models and their mean take 9"):
        searched(8)
    with pytest.raises(ValueError, match="signs='positive'"):
        searched(100, signs="positive")
    tasks = iter(range(100))
    with pytest.raises(ValueError, match=r"scores of \['1'\]; there must be some, of the same tasks every time"):
        optimise_linear(POINTS, lambda soup: {str(next(tasks)): 0.0})
    with pytest.raises(ValueError, match="1 weights for 2 models"):
        Soup(POINTS[:2], (1.0,))
    assert Point((1.0,), {"score": math.nan}, "single").score == -math.inf
