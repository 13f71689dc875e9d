"""StoSignSGD: Unbiased Structural Stochasticity Fixes SignSGD for Training Large Language Models (arXiv 2604.15416)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conformance.problems import Grads, distance, draw, leaves, play, same
from optim.toys import apply, numbers
from torch import Tensor

from poise.optim import Optimizer, Signum, StoSignSGD, Transform, chain
from poise.optim.rules.lion import lion
from poise.optim.rules.stosignsgd import stochastic_sign
from poise.optim.transforms.adaptive import adam

stosignsgd = partial(StoSignSGD, backend="eager")

CASES: list[dict[str, Any]] = [{}, {"momentum": 0.6, "weight_decay": 0.3}, {"momentum": 0.0, "max_beta": 0.9}]


def uniforms(params: Sequence[Tensor], grads: Grads, seed: int = 0) -> list[list[Tensor]]:
    """What the second link of a chain draws in each step: the method's own choice, so a reference has to be told it."""
    zeros = leaves([torch.zeros_like(p, dtype=torch.float64) for p in params])
    opt = Optimizer(zeros, chain(apply(), apply(lambda u, state, x, k: k.uniform())), lr=1.0, seed=seed, backend="eager")
    rows = []
    for row in grads:
        rows.append([-p for p in play(opt, zeros, [row])])
        for p in zeros:
            p.data.zero_()
    return rows


def reference(
    params: Sequence[Tensor],
    grads: Grads,
    *,
    lr: float | Sequence[float],
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    max_beta: float = 1.0,
) -> list[Tensor]:
    """Algorithm 3: average, largest average so far, noise of that size, sign."""
    rates = [lr] * len(grads) if not isinstance(lr, Sequence) else lr
    x = [p.double().clone() for p in params]
    m, G = [torch.zeros_like(w) for w in x], [torch.zeros_like(w) for w in x]
    for rate, row, noise in zip(rates, grads, uniforms(params, grads), strict=True):
        for i, g in enumerate(row):
            if g is not None:
                m[i] = momentum * m[i] + (1 - momentum) * g.double()
                G[i] = torch.maximum(max_beta * G[i], m[i].abs())
                n = 2 * noise[i] - 1
                x[i] = x[i] - rate * torch.sign(m[i] + G[i] * n) - rate * weight_decay * x[i]
    return x


@pytest.mark.parametrize("hyper", CASES, ids=["defaults", "others", "no momentum, forgetting"])
def test_sixty_steps_equal_the_formula(hyper: dict[str, Any]) -> None:
    start, grads = draw([(16, 8), (16,)], 60)
    params = leaves(start)
    found = play(stosignsgd(params, lr=0.01, **hyper), params, grads)
    assert distance(found, reference(start, grads, lr=0.01, **hyper)) < 1e-13


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_first_step_is_that_of_signsgd_whatever_the_seed(seed: int, dtype: torch.dtype) -> None:
    start, grads = draw([(500, 400), (7,)], 1, dtype=dtype)
    a, b = leaves(start), leaves(start)
    found = play(stosignsgd(a, lr=0.01, weight_decay=0.1, seed=seed), a, grads)
    assert same(found, play(Signum(b, lr=0.01, weight_decay=0.1, backend="eager"), b, grads))


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-24])
def test_the_most_extreme_noise_does_not_turn_the_largest_entries_nor_stop_them(uniform: float) -> None:
    """uniform() gives 0 once in 2^24 draws: n = -1 then would make u + U n zero."""
    u = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    u[:3] = torch.tensor([1.0, 2.0**-20, -1.0])
    k: Any = SimpleNamespace(max_beta=1.0, uniform=lambda: torch.full_like(u, uniform))
    state = {"max_abs": torch.zeros_like(u)}
    assert torch.equal(stochastic_sign().update(u, state, u, k), u.sign())


def test_the_mean_of_the_sign_is_the_momentum_over_its_largest() -> None:
    """100,000 draws of each: 1e-2 is three standard deviations."""
    ratios = numbers(-1.0, -0.7, -0.1, 0.0, 0.25, 0.9)
    first, then = 4 * torch.ones(100_000, 6, dtype=torch.float64), (4 * ratios).expand(100_000, 6)
    params = leaves([torch.zeros_like(first)])
    opt = stosignsgd(params, lr=1.0, momentum=0.0)
    before = play(opt, params, [[first]])
    moved = before[0] - play(opt, params, [[then]])[0]
    assert torch.equal(moved.abs(), torch.ones_like(moved))
    assert (moved.mean(0) - ratios).abs().max() < 1e-2


def test_it_finds_the_minimum_of_a_stochastic_linear_loss_where_signs_find_the_maximum() -> None:
    """On [-1, 1], slope 4 with probability 0.3 and else -1: +0.5 on average, so -1 is best; most slopes point to +1."""
    ends = {}
    for name, make in (("signsgd", Signum), ("stosignsgd", StoSignSGD)):
        generator = torch.Generator().manual_seed(0)
        params = leaves([torch.zeros(32, dtype=torch.float64)])  # 32 runs side by side
        opt = make(params, lr=0.2, momentum=0.0, backend="eager")
        for t in range(1, 1501):
            opt.param_groups[0]["lr"] = 0.2 / t**0.5
            params[0].grad = torch.where(torch.rand(32, generator=generator) < 0.3, 4.0, -1.0).double()
            opt.step()
            params[0].data.clamp_(-1, 1)
        ends[name] = params[0].detach()
    assert ends["signsgd"].min() > 0.95
    assert ends["stosignsgd"].median() < -0.98
    assert ends["stosignsgd"].mean() < -0.8


@pytest.mark.parametrize("rule, largest", [(adam((0.9, 0.99)), True), (lion(), False)], ids=["adam", "lion"])
def test_any_rule_is_converted_by_the_link_after_it(rule: Transform, largest: bool) -> None:
    """What the rule alone would do, over the largest it has done, is the mean of the sign; the noise tells the very signs."""
    start, grads = draw([(16, 8), (16,)], 12)
    zeros = [torch.zeros_like(p) for p in start]
    noise, plain, converted = uniforms(start, grads), leaves(zeros), leaves(zeros)
    alone = Optimizer(plain, rule, lr=1.0, backend="eager")
    opt = Optimizer(converted, chain(rule, stochastic_sign()), lr=1.0, backend="eager")
    U = [torch.zeros_like(p) for p in start]
    turned = 0
    for row, n in zip(grads, noise, strict=True):
        before = [p.detach().clone() for p in (*plain, *converted)]
        after = [*play(alone, plain, [row]), *play(opt, converted, [row])]
        moves = [b - a for a, b in zip(after, before, strict=True)]
        for i, u in enumerate(moves[:2]):
            U[i] = torch.maximum(U[i], u.abs())
            assert distance([moves[i + 2]], [torch.sign(u + U[i] * (2 * n[i] - 1))]) < 1e-12
            turned += int((moves[i + 2] * u < -0.5 * u.abs()).sum())
    assert (turned > 100) == largest  # Lion's moves are signs already, all as large as the largest, and stay what they are


def test_an_entry_that_never_had_a_gradient_does_not_move() -> None:
    start, grads = draw([(16, 8)], 10)
    for row in grads:
        assert row[0] is not None
        row[0][:, :3] = 0.0
    params = leaves(start)
    (found,) = play(stosignsgd(params, lr=0.01), params, grads)
    assert torch.equal(found[:, :3], start[0][:, :3])
    assert not torch.equal(found[:, 3:], start[0][:, 3:])


def test_after_a_spike_the_others_are_measured_by_it_until_it_is_forgotten() -> None:
    """A gradient of 100, then of 1: for ever 1 in 100 on average, with max_beta 0.95 after 90 steps 1."""
    rows: Grads = [[torch.full((2000,), 100.0 if t == 0 else 1.0, dtype=torch.float64)] for t in range(150)]
    means = {}
    for max_beta in (1.0, 0.95):
        params = leaves([torch.zeros(2000, dtype=torch.float64)])
        opt = stosignsgd(params, lr=1.0, momentum=0.0, max_beta=max_beta)
        before = play(opt, params, rows[:100])[0]
        means[max_beta] = float((before - play(opt, params, rows[100:])[0]).mean() / 50)
    assert abs(means[1.0] - 0.01) < 0.01
    assert means[0.95] == 1.0


def test_with_nothing_remembered_it_is_signum_bit_for_bit() -> None:
    start, grads = draw([(16, 8)], 30)
    a, b = leaves(start), leaves(start)
    found = play(stosignsgd(a, lr=0.01, max_beta=0.0), a, grads)
    assert same(found, play(Signum(b, lr=0.01, backend="eager"), b, grads))


@pytest.mark.parametrize("state", ["fp32", "bf16", "int8", "int4"])
def test_in_every_format_an_entry_larger_than_ever_is_certain_of_its_sign(state: str) -> None:
    """So |m| <= G holds where it is used, however G was rounded when it was kept."""
    start, grads = draw([(64, 128)], 8, dtype=torch.float32)
    growing: Grads = [[4.0**t * g.sign() * (1 + g.abs() % 1) for g in row if g is not None] for t, row in enumerate(grads)]
    a, b = leaves(start), leaves(start)
    found = play(stosignsgd(a, lr=0.01, momentum=0.0, state=state), a, growing)
    assert same(found, play(Signum(b, lr=0.01, momentum=0.0, backend="eager"), b, growing))


@pytest.mark.parametrize("state, near", [("bf16", 0.03), ("int8", 0.07), ("int4", 0.35)])
def test_in_small_formats_some_signs_turn_but_the_mean_move_stays(state: str, near: float) -> None:
    """A probability that a format moves by 1/100 turns one sign in 100."""
    start, noise = draw([(256, 128)], 20, dtype=torch.float32)
    pull = 0.5 * draw([(1, 128)], 0, seed=7, dtype=torch.float32)[0][0]
    rows: Grads = [[pull + g for g in row if g is not None] for row in noise]
    ends = []
    for kept in ("fp32", state):
        params = leaves(start)
        ends.append(start[0] - play(stosignsgd(params, lr=0.01, state=kept), params, rows)[0])
    assert (ends[1] - ends[0]).norm() < near * ends[0].norm()
    means = [end.mean(0) for end in ends]  # 256 rows with one pull
    assert (means[1] - means[0]).norm() < 0.3 * near * means[0].norm()


def test_other_seeds_draw_other_signs() -> None:
    start, grads = draw([(16, 8)], 5)
    ends = []
    for seed in (0, 0, 1):
        params = leaves(start)
        ends.append(play(stosignsgd(params, lr=0.01, seed=seed), params, grads))
    assert same(ends[0], ends[1])
    assert not same(ends[0], ends[2])


@pytest.mark.parametrize(
    "name, value", [("lr", -0.1), ("momentum", 1.0), ("weight_decay", -0.1), ("max_beta", 1.1), ("max_beta", -0.1)]
)
def test_an_impossible_setting_is_refused_by_name(name: str, value: float) -> None:
    hyper: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=name):
        stosignsgd(leaves(draw([(4, 4)], 0)[0]), **hyper)
