"""How weights are written: bfloat16 rounded stochastically, to nearest, or kept whole in two halves; and what rounding kept."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from conformance.problems import draw, leaves, play, same
from optim.toys import apply, heavy, optimizer
from torch import Tensor

from poise.optim import AdamW, Context, Optimizer, Param, Slot, Transform, chain
from poise.optim.transform import State

BF16 = torch.bfloat16


class feedback(Transform):
    """Gradient descent that adds to every step what rounding kept from the one before."""

    owns_step = True

    def slots(self, p: Param) -> dict[str, Slot]:
        return {"kept_back": Slot(tuple(p.shape)), "seen": Slot(tuple(p.shape))}

    def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float]:
        return {"lr": float(hyper["lr"])}

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return state["kept_back"] - k.lr * u

    def written(self, error: Tensor, state: State, x: Tensor, k: Context) -> None:
        state["kept_back"] = error
        state["seen"] = x + 0


def grid(shape: tuple[int, ...], low: int, high: int, unit: float, seed: int = 0) -> Tensor:
    """Random multiples of `unit`: few enough bits that sums of many are exact."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).double() * unit


@pytest.mark.parametrize("backend", ["eager", "chunks", "tiles"])
@pytest.mark.parametrize("weights", ["nearest", "stochastic"])
def test_a_rule_is_told_exactly_what_rounding_kept_from_the_weights(weights: Any, backend: Any) -> None:
    """So that weights and kept error add up to the exact sum of all steps."""
    shapes = [(40, 130), (33,)]
    start = [grid(shape, 128, 256, 2.0**-7) for shape in shapes]
    params = leaves(start, BF16)
    opt = Optimizer(params, feedback(), lr=2.0**-4, weights=weights, backend=backend)
    exact = [w.clone() for w in start]
    for step in range(12):
        row = [grid(shape, -128, 128, 2.0**-10, seed=step + 1) for shape in shapes]
        play(opt, params, [list(row)])
        for w, g in zip(exact, row, strict=True):
            w -= 2.0**-4 * g
    for p, wanted in zip(params, exact, strict=True):
        error = opt.state[p]["kept_back"]
        assert bool((error != 0).any())
        assert torch.equal(p.detach().double() + error.double(), wanted)
        assert torch.equal(opt.state[p]["seen"], p.detach().float())


def test_no_rule_is_told_of_rounding_where_there_is_none() -> None:
    class startled(feedback):
        def written(self, error: Tensor, state: State, x: Tensor, k: Context) -> None:
            raise AssertionError(f"told of {error}")

    start, grads = draw([(8, 3)], 2, dtype=torch.float32)
    params = leaves(start)
    play(optimizer(params, startled(), lr=0.1), params, grads)


def test_every_link_of_a_chain_may_listen() -> None:
    class hearing(heavy):
        def written(self, error: Tensor, state: State, x: Tensor, k: Context) -> None:
            state["buffer"] = error

    start, grads = draw([(8, 3)], 1, dtype=BF16)
    (p,) = params = leaves(start)
    opt = optimizer(params, chain(hearing(), apply()), lr=0.1, weights="nearest")
    play(opt, params, grads)
    assert grads[0][0] is not None
    wanted = start[0].float() - 0.1 * grads[0][0].float()
    assert torch.equal(opt.state[p]["buffer"], wanted - p.detach().float())


# -- stochastic rounding -------------------------------------------------------------------------------------------------


def written(value: float, size: int = 60_000, **options: Any) -> Tensor:
    """bfloat16 weights of 0 that are told to become `value`."""
    params = leaves([torch.zeros(size)], BF16)
    rule = apply(lambda u, state, x, k: torch.full_like(u, value), owns_step=True)
    return play(optimizer(params, rule, lr=1.0, **options), params, [[torch.zeros(size)]])[0].double()


@pytest.mark.parametrize("share", [0.125, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_stochastic_rounding_takes_one_of_the_two_neighbours_and_the_right_one_on_average(share: float, sign: float) -> None:
    low, gap = 1.0078125, 2.0**-7
    found = written(sign * (low + share * gap))
    assert set(found.unique().tolist()) == {sign * low, sign * (low + gap)}
    up = float((found.abs() > low).double().mean())
    assert abs(up - share) < 5 * math.sqrt(share * (1 - share) / 60_000)


@pytest.mark.parametrize("value", [1.5, -0.0, 0.0, 3.0e38, float("inf"), float("-inf"), 2.0**-126])
def test_what_bfloat16_can_hold_is_written_as_it_is(value: float) -> None:
    wanted = float(torch.tensor(value).bfloat16())
    assert written(wanted, size=1000).unique().tolist() == [wanted]


def test_a_nan_stays_one() -> None:
    assert bool(written(float("nan"), size=1000).isnan().all())


def test_rounding_to_nearest_is_torchs_own() -> None:
    value = 1.0 + 0.51 * 2.0**-7
    assert written(value, size=100, weights="nearest").unique().tolist() == [float(torch.tensor(value).bfloat16())]


@pytest.mark.parametrize("weights", ["stochastic", "split"])
def test_float16_weights_are_rounded_to_nearest_only(weights: Any) -> None:
    params = leaves([torch.ones(3)], torch.float16)
    with pytest.raises(ValueError, match=rf"'{weights}'.*float16"):
        optimizer(params, apply(), lr=1.0, weights=weights)
    play(optimizer(params, apply(), lr=0.5), params, [[torch.ones(3)]])
    assert params[0].tolist() == [0.5] * 3


@pytest.mark.parametrize("weights", ["stochastic", "split", "nearest"])
def test_float32_parameters_beside_bfloat16_ones_are_not_rounded(weights: Any) -> None:
    start, grads = draw([(8, 3), (5,)], 3, dtype=torch.float32)
    mixed = [*leaves(start[:1], BF16), *leaves(start[1:])]
    twin = leaves(start[1:])
    found = play(optimizer(mixed, heavy(), lr=0.1, weights=weights), mixed, grads)
    assert same(found[1:], play(optimizer(twin, heavy(), lr=0.1), twin, [row[1:] for row in grads]))


# -- both halves kept ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "chunks", "tiles"])
def test_split_weights_train_bit_for_bit_as_float32_ones_whose_bfloat16_copies_are_used(backend: str) -> None:
    """The gradient is taken at the bfloat16 weights in both runs; what is summed up is float32."""
    (start, target), _ = draw([(16, 24), (16, 24)], 0, dtype=torch.float32)
    ours, master = leaves([start.bfloat16().float()], BF16), leaves([start.bfloat16().float()])
    opt = optimizer(ours, heavy(), lr=1e-3, weight_decay=0.1, weights="split", backend=backend)
    twin = optimizer(master, heavy(), lr=1e-3, weight_decay=0.1, backend=backend)

    def gradient(w: Tensor) -> Tensor:
        return (w - target.bfloat16()).sin()

    for _ in range(40):
        used = master[0].detach().bfloat16()
        assert torch.equal(ours[0].detach(), used)
        play(twin, master, [[gradient(used).float()]])
        play(opt, ours, [[gradient(ours[0].detach())]])
    low = opt.state[ours[0]]["weight.low"]
    assert low.dtype is torch.int16 and low.shape == start.shape
    exact = (ours[0].detach().float().view(torch.int32) + low.int()).view(torch.float32)
    assert same([exact], [master[0].detach()])
    assert not torch.equal(exact, exact.bfloat16().float())


def test_split_weights_take_two_more_bytes_of_state_per_element_and_no_more() -> None:
    def size(weights: Any) -> int:
        return optimizer(leaves([torch.zeros(40, 50)], BF16), heavy(), lr=1.0, weights=weights).state_bytes()

    assert size("split") - size("nearest") == 2 * 40 * 50


def test_a_resumed_split_run_is_the_uninterrupted_one() -> None:
    start, grads = draw([(16, 24), (7,)], 6, dtype=BF16)
    params, fresh = leaves(start), leaves(start)
    opt = optimizer(params, heavy(), lr=1e-3, weights="split")
    halfway = play(opt, params, grads[:3])
    saved = copy.deepcopy(opt.state_dict())
    wanted = play(opt, params, grads[3:])
    again = optimizer(fresh, heavy(), lr=1e-3, weights="split")
    again.load_state_dict(saved)
    for p, w in zip(fresh, halfway, strict=True):
        p.data.copy_(w)
    assert same(play(again, fresh, grads[3:]), wanted)
    assert same([again.state[p]["weight.low"] for p in fresh], [opt.state[p]["weight.low"] for p in params])


@pytest.mark.parametrize("weights", ["auto", "stochastic", "nearest", "split"])
@pytest.mark.parametrize("backend", ["chunks", "tiles"])
def test_every_backend_writes_the_same_weights(weights: Any, backend: Any) -> None:
    start, grads = draw([(70, 130), (33,)], 3, dtype=BF16)
    params, twin = leaves(start), leaves(start)
    found = play(Optimizer(params, heavy(), lr=0.1, weights=weights, backend=backend), params, grads)
    # a decimal lr times a float32 may be rounded once or twice (fused multiply and add): a weight in some thousands
    # lies close enough to where the rounding turns
    wanted = play(optimizer(twin, heavy(), lr=0.1, weights=weights), twin, grads)
    for a, b in zip(found, wanted, strict=True):
        assert float((a != b).double().mean()) < 0.002
        assert torch.allclose(a.float(), b.float(), rtol=2.0**-7, atol=1e-6)


def _regression(weights: Any, lr: float, steps: int = 800) -> float:
    """The last loss of a small network that learns a random teacher from fresh inputs, its gradients taken in float32."""
    g = torch.Generator().manual_seed(0)
    first, second = torch.randn(32, 64, generator=g) / 6, torch.randn(64, 8, generator=g) / 8
    shapes = [(128, 32), (128,), (8, 128), (8,)]
    start = [torch.randn(shape, generator=g) * (0.18 if len(shape) > 1 else 0.0) for shape in shapes]
    params = leaves([w if weights == "float32" else w.to(torch.bfloat16) for w in start])
    opt = AdamW(params, lr=lr, weight_decay=0.0, **({} if weights == "float32" else {"weights": weights}))
    schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.0, steps)
    losses = []
    for _ in range(steps):
        x = torch.randn(128, 32, generator=g)
        w = [p.detach().float().requires_grad_() for p in params]
        out = torch.tanh(x @ w[0].T + w[1]) @ w[2].T + w[3]
        loss = (out - torch.tanh(x @ first) @ second).square().mean()
        for p, grad in zip(params, torch.autograd.grad(loss, w), strict=True):
            p.grad = grad.to(p.dtype)
        opt.step()
        schedule.step()
        losses.append(loss.item())
    return sum(losses[-50:]) / 50


def test_bfloat16_weights_learn_as_float32_ones_unless_they_are_rounded_to_nearest() -> None:
    exact = _regression("float32", 3e-3)
    assert _regression("stochastic", 3e-3) == pytest.approx(exact, rel=0.03)
    assert _regression("split", 3e-3) == pytest.approx(exact, rel=0.01)
    assert _regression("nearest", 3e-3) > 1.2 * exact
