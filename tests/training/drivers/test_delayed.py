"""Delayed gradients: the simulator of Adaptive Braking for Mitigating Gradient Delay (arXiv 2007.01397)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conformance.problems import same
from torch import Tensor, nn
from training.cases import Bowl, bowl_task, classify, play, trained

from poise.optim import SGD, AdamW
from poise.training import Delayed

CASES: list[dict[str, Any]] = [{"delay": 0}, {"delay": 1}, {"delay": 3}]
NEUTRAL: dict[str, Any] = {"delay": 0}
TYPICAL: dict[str, Any] = {"delay": 1}


def reference(bowl: Bowl, *, lr: float, steps: int, delay: int) -> tuple[list[Tensor], list[Tensor]]:
    """All points that were visited are remembered, and the gradient is taken at the one of D steps ago."""
    visited = [bowl.start()]
    for t in range(steps):
        x = visited[-1]
        if t >= delay:
            g = bowl.gradient(visited[t - delay], t - delay)
            x = [a - lr * b for a, b in zip(x, g, strict=True)]
        visited.append(x)
    return visited[-1], visited[-1]


@pytest.mark.parametrize("delay", [1, 2, 5])
def test_the_gradient_of_a_step_is_that_of_d_steps_before(delay: int) -> None:
    task = bowl_task()
    opt = Delayed(SGD(task.model, lr=0.1, backend="eager"), delay=delay)
    visited, gradients = [trained(task)], []
    for step in range(12):
        play(opt, task, 1, step)
        gradients.append([p.grad.clone() for p in task.model.parameters() if p.grad is not None])  # those at hand
        visited.append(trained(task))
        if step < delay:
            assert same(visited[-1], visited[-2])
        else:
            wanted = [x - 0.1 * g for x, g in zip(visited[-2], gradients[step - delay], strict=True)]
            assert same(visited[-1], wanted)


@pytest.mark.parametrize("make", [lambda m: SGD(m, lr=0.1, momentum=0.9), lambda m: AdamW(m, lr=0.01)])
def test_without_delay_it_is_the_base_bit_for_bit(make: Any) -> None:
    task, twin = classify(), classify()
    opt = Delayed(make(task.model), delay=0)
    assert same(play(opt, task, 5), play(make(twin.model), twin, 5))


def test_a_gradient_that_was_missing_is_missing_when_its_turn_comes() -> None:
    x = nn.Parameter(torch.ones(3))
    opt = Delayed(torch.optim.SGD([x], lr=0.1, momentum=0.5), delay=2)  # with momentum a gradient of zero would move it
    moved = []
    for step in range(6):
        held = torch.full((3,), float(step + 1))
        x.grad = None if step == 1 else held
        before = x.detach().clone()
        opt.step()
        moved.append(float((before - x.detach())[0]))
        held.zero_()  # as zero_grad(set_to_none=False) does
    assert moved == pytest.approx([0, 0, 0.1, 0, 0.35, 0.575])


@pytest.mark.parametrize("delay", [-1, 1.5, True])
def test_a_delay_that_is_no_number_of_steps_is_refused(delay: Any) -> None:
    with pytest.raises(ValueError, match="delay="):
        Delayed(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), delay=delay)


def test_what_waits_is_saved_and_a_resumed_run_goes_on_bit_for_bit() -> None:
    task, twin = classify(), classify()
    opt = Delayed(AdamW(task.model, lr=0.01, backend="eager"), delay=3)
    play(opt, task, 4)
    model, saved = copy.deepcopy(task.model.state_dict()), copy.deepcopy(opt.state_dict())
    wanted = play(opt, task, 5, 4)
    twin.model.load_state_dict(model)
    again = Delayed(AdamW(twin.model, lr=0.01, backend="eager"), delay=3)
    again.load_state_dict(saved)
    assert same(play(again, twin, 5, 4), wanted)
