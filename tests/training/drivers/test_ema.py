"""EMA (Exponential Moving Average of Weights in Deep Learning: Dynamics and Benefits, arXiv 2411.18704)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conformance.problems import distance, same
from torch import Tensor, nn
from training.cases import Bowl, Task, bowl_task, classify, play, trained

from poise.optim import SGD
from poise.training import EMA

CASES: list[dict[str, Any]] = [
    {"p": 0.3},
    {"p": 0.1, "every": 3},
    {"p": 0.05, "warmup": "exponential", "horizon": 4},
    {"p": 0.02, "warmup": "linear", "horizon": 5},
]
NEUTRAL: dict[str, Any] = {"p": 0.3}
TYPICAL: dict[str, Any] = {"p": 0.3}


def reference(
    bowl: Bowl, *, lr: float, steps: int, p: float, every: int = 1, warmup: str = "none", horizon: int = 1
) -> tuple[list[Tensor], list[Tensor]]:
    """Plain descent, and an average that takes in every `every`-th of its points."""
    x, e = bowl.start(), bowl.start()
    for t in range(steps):
        g = bowl.gradient(x, t)
        x = [a - lr * b for a, b in zip(x, g, strict=True)]
        share = p
        if warmup == "exponential":
            share = (1 - p) * math.exp(-(1 + t) / horizon) + p
        elif warmup == "linear":
            share = max(p, (1 - p) * (1 - t / horizon) * 0.1)
        if (t + 1) % every == 0:
            e = [(1 - share) * a + share * b for a, b in zip(e, x, strict=True)]
    return x, e


def shown(opt: EMA, task: Task) -> list[Tensor]:
    with opt.evaluating():
        return trained(task)


def test_the_first_average_of_one_step_lies_p_of_the_way() -> None:
    task = bowl_task()
    start = trained(task)
    opt = EMA(SGD(task.model, lr=0.1), p=0.25)
    after = play(opt, task, 1)
    assert distance(shown(opt, task), [0.75 * a + 0.25 * b for a, b in zip(start, after, strict=True)]) < 1e-15


def test_p_of_one_shows_the_weights_themselves() -> None:
    task = bowl_task()
    opt = EMA(SGD(task.model, lr=0.1), p=1.0)
    assert same(play(opt, task, 3), shown(opt, task))


def test_without_motion_the_average_stands_still_bit_for_bit() -> None:
    task = classify()
    opt = EMA(SGD(task.model, lr=0.0), p=0.37)
    start = trained(task)
    play(opt, task, 5)
    assert same(shown(opt, task), start)


def test_weights_are_the_trainings_again_after_evaluation_also_after_an_error() -> None:
    task = classify()
    opt = EMA(SGD(task.model, lr=0.1), p=0.1)
    wanted = play(opt, task, 3)
    seen = []

    def fail() -> None:
        with opt.evaluating():
            seen.append(trained(task))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not same(seen[0], wanted)
    assert same(trained(task), wanted)
    assert not same(shown(opt, task), wanted)


def test_evaluating_between_steps_changes_nothing_of_the_run() -> None:
    ends = []
    for looks in (False, True):
        task = classify()
        opt = EMA(SGD(task.model, lr=0.1, momentum=0.9), p=0.1)
        for step in range(4):
            play(opt, task, 1, step)
            if looks:
                shown(opt, task)
        ends.append([*trained(task), *shown(opt, task)])
    assert same(*ends)


def test_a_step_inside_evaluating_is_refused_and_so_is_entering_twice() -> None:
    task = classify()
    opt = EMA(SGD(task.model, lr=0.1))
    with opt.evaluating():
        with pytest.raises(RuntimeError, match="evaluating"):
            play(opt, task, 1)
        with pytest.raises(RuntimeError, match="entered already"), opt.evaluating():
            pass
    play(opt, task, 1)


def test_what_is_saved_does_not_depend_on_whether_one_is_evaluating() -> None:
    task = classify()
    opt = EMA(SGD(task.model, lr=0.1, momentum=0.9), p=0.2)
    play(opt, task, 3)
    outside = [t.clone() for t in opt.state_dict()["drivers"][0]["weights"]]
    with opt.evaluating():
        inside = opt.state_dict()["drivers"][0]["weights"]
        assert same(inside, outside)


def test_batch_statistics_are_averaged_and_counters_are_left_alone() -> None:
    norm = nn.BatchNorm1d(24)
    task = classify(more=[norm])
    opt = EMA(SGD(task.model, lr=0.1), task.model, p=0.25)
    assert norm.running_mean is not None
    wanted = norm.running_mean.clone()
    for step in range(3):
        play(opt, task, 1, step)
        wanted = 0.75 * wanted + 0.25 * norm.running_mean
    now = norm.running_mean.clone()
    with opt.evaluating():
        assert distance([norm.running_mean], [wanted]) < 1e-6
        assert int(norm.num_batches_tracked or 0) == 3
    assert same([norm.running_mean], [now])


def test_the_average_of_bfloat16_weights_moves_although_they_would_not() -> None:
    """A p of 0.0002 times a distance of one weight is below a tenth of bfloat16's spacing: in it, nothing would ever move."""
    weight = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    opt = EMA(torch.optim.SGD([weight], lr=1.0), p=2e-4)
    weight.data.fill_(2.0)
    for _ in range(100):
        opt.step()
    (shadow,) = opt.own["weights"]
    assert shadow.dtype == torch.float32
    assert distance([shadow], [torch.full((64,), 2 - (1 - 2e-4) ** 100)]) < 1e-4


def test_the_lower_half_of_split_weights_enters_the_average() -> None:
    ends = []
    for dtype, weights in ((torch.float32, "auto"), (torch.bfloat16, "split")):
        params = [nn.Parameter(torch.linspace(0.5, 1.5, 64).bfloat16().to(dtype))]
        opt = EMA(SGD(params, lr=1e-4, weights=weights, backend="eager"), p=0.5)  # pyright: ignore[reportArgumentType]
        for _ in range(5):
            params[0].grad = torch.ones(64, dtype=dtype)
            opt.step()
        ends.append(opt.own["weights"])
    assert distance(*ends) < 1e-7
    assert distance(ends[1], [torch.linspace(0.5, 1.5, 64).bfloat16()]) > 1e-4


@pytest.mark.parametrize(
    "hyper", [{"p": 0.0}, {"p": 1.5}, {"every": 0}, {"warmup": "slow"}, {"horizon": 0}], ids=lambda hyper: next(iter(hyper))
)
def test_an_impossible_setting_is_refused_by_name(hyper: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(hyper))):
        EMA(SGD(classify().model), **hyper)
