"""Sophia (Sophia: A Scalable Stochastic Second-order Optimizer, arXiv 2305.14342)."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conformance.problems import Grads, distance, draw, leaves, play, same
from torch import Tensor

from poise.optim import Optimizer, Sophia, chain, clip
from poise.optim.rules.sophia import sophia
from poise.training.curvature import feed_hessian, hutchinson

CASES: list[dict[str, Any]] = [
    {},
    {"betas": (0.9, 0.8), "rho": 0.5, "weight_decay": 0.3},
    {"rho": 0.01, "samples": 40.0, "betas": (0.5, 0.9)},
]
EVERY = 2


class Feeding:
    """Before every other step, the squares of the gradients at hand, negative ones among them, as the Hessian."""

    param_groups: Any
    feed: Any

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if max(group["clock"] for group in self.param_groups) % EVERY == 0:
            params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
            self.feed(hessian={p: p.grad * p.grad.abs() for p in params})
        inspect.unwrap(Sophia.step)(self)  # torch wraps hooks around the step of each class, and would call them twice
        return loss


class Fed(Feeding, Sophia):
    """At module level, so that it can be pickled."""


def build(params: Any, **options: Any) -> Optimizer:
    """Sophia, fed in every other step; around whatever stands here under that name."""
    kind = Fed if issubclass(Fed, Sophia) else type("Fed", (Feeding, Sophia), {})
    return kind(params, **options)


def reference(
    params: Sequence[Tensor],
    grads: Grads,
    *,
    lr: float | Sequence[float],
    betas: tuple[float, float] = (0.965, 0.99),
    rho: float = 0.04,
    weight_decay: float = 0.1,
    samples: float = 1.0,
) -> list[Tensor]:
    """As in the authors' code: decay, momentum, then the sign times the clipped ratio; the Hessian is averaged apart."""
    rates = list(lr) if isinstance(lr, Sequence) else [lr] * len(grads)
    w = [p.double().clone() for p in params]
    m, h = [torch.zeros_like(x) for x in w], [torch.zeros_like(x) for x in w]
    for t, (rate, row) in enumerate(zip(rates, grads, strict=True)):
        for i, gradient in enumerate(row):
            if gradient is None:
                continue
            g = gradient.double()
            if t % EVERY == 0:
                h[i] = betas[1] * h[i] + (1 - betas[1]) * torch.sign(g) * g**2
            w[i] = w[i] * (1 - rate * weight_decay)
            m[i] = betas[0] * m[i] + (1 - betas[0]) * g
            ratio = m[i].abs() / (torch.where(h[i] > 0, rho * samples * h[i], torch.zeros(())) + 1e-15)
            w[i] = w[i] - rate * torch.sign(m[i]) * torch.minimum(ratio, torch.ones(()))
    return w


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_before_the_first_estimate_every_entry_moves_by_lr_exactly(dtype: torch.dtype) -> None:
    _, grads = draw([(16, 8)], 5, dtype=dtype)
    params = leaves([torch.zeros(16, 8, dtype=dtype)])
    opt = Sophia(params, lr=0.25, weight_decay=0.0, backend="eager")
    at, m = torch.zeros(16, 8, dtype=dtype), torch.zeros(16, 8, dtype=torch.float64)
    for (g,) in grads:
        assert g is not None
        m = 0.965 * m + 0.035 * g.double()
        at = at - 0.25 * torch.sign(m).to(dtype)
        assert same(play(opt, params, [[g]]), [at])
    assert opt.win_rate() == 0.0


def test_where_curvature_is_large_a_step_is_lr_m_over_rho_h() -> None:
    start, grads = draw([(16, 8)], 1)
    (g,) = grads[0]
    assert g is not None
    params = leaves(start)
    opt = Sophia(params, lr=0.1, rho=0.05, samples=7.0, weight_decay=0.0, backend="eager")
    hessian = 100.0 * (1.0 + start[0].abs())
    opt.feed(hessian=[hessian])
    wanted = start[0] - 0.1 * (0.035 * g) / (0.05 * 7.0 * 0.01 * hessian)
    assert distance(play(opt, params, grads), [wanted]) < 1e-15
    assert opt.win_rate() == 1.0


def test_no_entry_moves_by_more_than_lr_and_negative_curvature_does_not_turn_a_step_round() -> None:
    start, grads = draw([(64, 8)], 12)
    params = leaves(start)
    opt = Sophia(params, lr=0.1, weight_decay=0.0, betas=(0.0, 0.0), backend="eager")
    generator = torch.Generator().manual_seed(3)
    for (g,) in grads:
        assert g is not None
        before = params[0].detach().clone()
        hessian = 30 * torch.randn(64, 8, generator=generator, dtype=torch.float64)
        opt.feed(hessian=[hessian])
        move = play(opt, params, [[g]])[0] - before
        assert float(move.abs().max()) <= 0.1 + 1e-15
        assert bool((move * g <= 0).all())
        assert float((move + 0.1 * torch.sign(g))[hessian < 0].abs().max()) < 1e-15
        assert opt.win_rate() == float(((g.abs() < 0.04 * hessian) & (hessian > 0)).double().mean())


def test_an_estimate_counts_from_the_step_that_it_is_fed_to_and_is_kept_between() -> None:
    start, grads = draw([(8, 4), (5,)], 4)
    params = leaves(start)
    opt = Sophia(params, betas=(0.9, 0.75), backend="eager")
    play(opt, params, grads[:1])
    opt.feed(hessian={params[0]: torch.full((8, 4), 8.0)})
    play(opt, params, grads[1:2])
    kept = [opt.state[p]["hessian"].clone() for p in params]
    assert same(kept, [torch.full((8, 4), 2.0, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)])
    play(opt, params, grads[2:])
    assert same([opt.state[p]["hessian"] for p in params], kept)


def test_squares_of_the_mean_gradient_with_their_number_are_estimates_of_the_hessian_without() -> None:
    """The authors' code averages the squares alone and multiplies by B in the step."""
    start, grads = draw([(16, 8)], 6)
    ends = []
    for times, samples in ((480.0, 1.0), (1.0, 480.0)):
        params = leaves(start)
        opt = Sophia(params, lr=0.01, samples=samples, backend="eager")
        for (g,) in grads:
            assert g is not None
            opt.feed(hessian=[times * g * g])
            play(opt, params, [[g]])
        ends.append(params)
    assert distance(*ends) < 1e-14


def steps_to(target: float, curvature: Tensor, opt: Any, x: Any, most: int = 20_000) -> int:
    """Steps on `sum h x^2 / 2` until it is below the target."""
    for step in range(most):
        loss = (curvature * x**2).sum() / 2
        if float(loss.detach()) < target:
            return step
        opt.zero_grad()
        loss.backward()
        opt.step()
    return most


def test_at_condition_number_10_000_it_is_faster_than_with_any_constant_in_place_of_the_hessian() -> None:
    curvature = torch.logspace(-2, 2, 8, dtype=torch.float64)
    model = torch.nn.Module()
    (start,), _ = draw([(8,)], 0)
    model.x = torch.nn.Parameter(start.clone())
    settings: dict[str, Any] = dict(lr=0.2, rho=1.0, betas=(0.9, 0.9), weight_decay=0.0, backend="eager")
    opt = Sophia(model, **settings)

    def loss() -> Tensor:
        x: Any = model.x
        return (curvature * x**2).sum() / 2

    feed_hessian(opt, lambda step: hutchinson(model, loss, seed=step, noise="rademacher"), every=1)
    mine = steps_to(1e-6, curvature, opt, model.x)
    frozen = []
    for constant in torch.logspace(-3, 3, 7):
        x = torch.nn.Parameter(start.clone())
        opt = Sophia([x], **settings)
        opt.state[x]["hessian"].fill_(constant)
        frozen.append(steps_to(1e-6, curvature, opt, x, 3 * mine))
    assert mine < 200
    assert min(frozen) == 3 * mine, (mine, frozen)


def test_clipping_the_norm_of_the_gradients_comes_before_it_in_a_chain() -> None:
    start, grads = draw([(16, 8)], 1)
    params = leaves(start)
    opt = Optimizer(params, chain(clip(1.0), sophia()), lr=0.1, backend="eager")
    opt.feed(hessian=[torch.ones(16, 8)])
    play(opt, params, grads)
    (g,) = grads[0]
    assert g is not None
    assert distance([opt.state[params[0]]["exp_avg"]], [0.035 * g / (g.norm() + 1e-6)]) < 1e-15


@pytest.mark.parametrize(
    "hyper, message", [({"betas": (1.0, 0.9)}, "betas"), ({"rho": -0.1}, "rho"), ({"samples": 0.0}, "samples=0.0")]
)
def test_an_impossible_setting_is_refused_by_name(hyper: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sophia(leaves([torch.zeros(2)]), **hyper)
