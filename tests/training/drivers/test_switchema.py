"""Switch EMA (Switch EMA: A Free Lunch for Better Flatness and Sharpness, arXiv 2402.09240)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conformance.problems import distance, same
from torch import Tensor, nn
from training.cases import Bowl, bowl_task, classify, play, trained

from poise.optim import SGD, AdamW
from poise.training import EMA, SwitchEMA

CASES: list[dict[str, Any]] = [
    {"p": 0.3, "switch_every": 3},
    {"p": 0.1, "switch_every": 2, "switch_start": 4},
    {"p": 0.2, "switch_every": 4, "every": 2},
    {"p": 0.05, "switch_every": 3, "warmup": "exponential", "horizon": 5},
]
NEUTRAL: dict[str, Any] = {"p": 1.0, "switch_every": 2}
TYPICAL: dict[str, Any] = {"p": 0.3, "switch_every": 2}


def reference(
    bowl: Bowl,
    *,
    lr: float,
    steps: int,
    p: float,
    switch_every: int,
    switch_start: int = 0,
    every: int = 1,
    warmup: str = "none",
    horizon: int = 1,
) -> tuple[list[Tensor], list[Tensor]]:
    """Plain descent that jumps to its average at the end of each epoch of `switch_every` steps."""
    x, e = bowl.start(), bowl.start()
    for number in range(1, steps + 1):
        g = bowl.gradient(x, number - 1)
        x = [a - lr * b for a, b in zip(x, g, strict=True)]
        if number % every == 0:
            share = p if warmup == "none" else p + (1 - p) * math.exp(-number / horizon)
            e = [e_i + share * (x_i - e_i) for e_i, x_i in zip(e, x, strict=True)]
        if number > switch_start and number % switch_every == 0:
            x = [e_i.clone() for e_i in e]
    return x, e


@pytest.mark.parametrize("switch_every", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_p_of_one_is_the_inner_optimizer_bit_for_bit(switch_every: int, dtype: torch.dtype) -> None:
    task, twin = classify(dtype=dtype), classify(dtype=dtype)
    opt = SwitchEMA(AdamW(task.model, lr=0.01, backend="eager"), p=1.0, switch_every=switch_every)
    assert same(play(opt, task, 7), play(AdamW(twin.model, lr=0.01, backend="eager"), twin, 7))


def test_one_step_epochs_of_plain_descent_are_descent_with_p_times_the_learning_rate() -> None:
    task, twin = bowl_task(), bowl_task()
    opt = SwitchEMA(SGD(task.model, lr=0.1), p=0.3, switch_every=1)
    assert distance(play(opt, task, 12), play(SGD(twin.model, lr=0.03), twin, 12)) < 1e-14


def test_a_switch_makes_the_weights_the_average_bit_for_bit_and_leaves_the_momentum() -> None:
    task = classify()
    inner = SGD(task.model, lr=0.1, momentum=0.9, backend="eager")
    opt = SwitchEMA(inner, p=0.1, switch_every=None)
    before = play(opt, task, 5)
    buffers = [inner.state[p]["momentum_buffer"].clone() for p in task.model.parameters()]
    shadow = [e.clone() for e in opt.own["weights"]]
    opt.switch()
    assert same(trained(task), shadow)
    assert same(opt.own["weights"], shadow)
    assert same([inner.state[p]["momentum_buffer"] for p in task.model.parameters()], buffers)
    assert distance(before, shadow) > 1e-3


def test_switching_by_steps_is_switching_by_hand_at_the_end_of_each_epoch() -> None:
    task, twin = classify(), classify()
    play(SwitchEMA(AdamW(task.model, backend="eager"), p=0.2, switch_every=4), task, 8)
    by_hand = SwitchEMA(AdamW(twin.model, backend="eager"), p=0.2, switch_every=None)
    for epoch in range(2):
        play(by_hand, twin, 4, 4 * epoch)
        by_hand.switch()
    assert same(trained(task), trained(twin))


def test_without_a_switch_it_is_plain_ema() -> None:
    task, twin = classify(), classify()
    opt = SwitchEMA(AdamW(task.model, backend="eager"), p=0.2, switch_every=2, switch_start=100)
    plain = EMA(AdamW(twin.model, backend="eager"), p=0.2)
    assert same(play(opt, task, 5), play(plain, twin, 5))
    assert same(opt.own["weights"], plain.own["weights"])


def test_on_a_noisy_quadratic_the_loss_after_switches_is_below_that_without() -> None:
    """Gradients of x^2/2 with unit noise at lr 0.5: descent hovers at a loss of 1/6 per coordinate, its averages far below."""
    losses = {}
    for switches in (False, True):
        x = nn.Parameter(torch.zeros(2000, dtype=torch.float64))
        inner = SGD([x], lr=0.5)
        opt = SwitchEMA(inner, p=0.02, switch_every=20) if switches else inner
        generator = torch.Generator().manual_seed(0)
        for _ in range(200):
            x.grad = x.detach() + torch.randn(2000, generator=generator, dtype=torch.float64)
            opt.step()
        losses[switches] = float(x.detach().square().mean() / 2)
    assert losses[False] == pytest.approx(0.5 / 2 / 1.5, rel=0.1)
    assert losses[True] < 0.1 * losses[False]


def test_batch_statistics_are_switched_with_the_weights_and_counters_are_not() -> None:
    norm = nn.BatchNorm1d(24)
    task = classify(more=[norm])
    opt = SwitchEMA(SGD(task.model, lr=0.1), task.model, p=0.2, switch_every=None)
    play(opt, task, 3)
    opt.switch()
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert same([norm.running_mean, norm.running_var], opt.own["buffers"])
    assert norm.num_batches_tracked is not None
    assert int(norm.num_batches_tracked) == 3


def test_a_switch_of_split_weights_sets_their_lower_half_too() -> None:
    params = [nn.Parameter(torch.linspace(0.5, 1.5, 64).bfloat16())]
    inner = SGD(params, lr=1e-4, weights="split", backend="eager")
    opt = SwitchEMA(inner, p=0.5, switch_every=None)
    for _ in range(3):
        params[0].grad = torch.ones(64, dtype=torch.bfloat16)
        opt.step()
    shadow = opt.own["weights"][0].clone()
    opt.switch()
    params[0].grad = torch.zeros(64, dtype=torch.bfloat16)
    opt.step()
    assert same(opt.own["weights"], [shadow]), "an average with what it was set to, the lower bits included, is itself"


def test_a_switch_while_evaluating_is_refused() -> None:
    opt = SwitchEMA(SGD(classify().model), switch_every=None)
    with opt.evaluating(), pytest.raises(RuntimeError, match="switch"):
        opt.switch()


@pytest.mark.parametrize("hyper", [{"switch_every": 0}, {"switch_every": 2, "switch_start": -1}])
def test_an_impossible_setting_is_refused_by_name(hyper: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="switch_"):
        SwitchEMA(SGD(classify().model), **hyper)
