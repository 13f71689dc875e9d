"""Induced-metric optimisers (The Optimiser Hidden in Plain Sight, arXiv 2509.03594)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from conformance.problems import Grads, distance, draw, leaves, play, same
from optim.toys import apply, zeros
from torch import Tensor

from poise.optim import AdamW, InducedMetric, Optimizer, chain
from poise.optim.rules.inducedmetric import induced_metric
from poise.optim.transforms.adaptive import adam

optimizer = partial(InducedMetric, backend="eager")

CASES: list[dict[str, Any]] = [
    {},
    {"momentum": 0.5, "xi": 1e-3, "beta": 0.0, "weight_decay": 0.3},
    {"variant": "rms"},
    {"variant": "rms", "momentum": 0.5, "xi": 1e-4, "beta": 0.95, "beta_rms": 0.9, "eps": 1e-2, "weight_decay": 0.3},
]
TYPICAL: dict[str, Any] = {"xi": 1e-4}  # of thousands of gradients around 1 the default leaves next to nothing
SHAPES: list[tuple[int, ...]] = [(4, 3), (5,), ()]


def reference(
    params: Sequence[Tensor],
    grads: Grads,
    *,
    lr: float | Sequence[float],
    momentum: float = 0.9,
    xi: float = 0.1,
    beta: float = 0.8,
    weight_decay: float = 0.0,
    variant: str = "plain",
    beta_rms: float = 0.99,
    eps: float = 1e-8,
    losses: Sequence[float] = (),
) -> list[Tensor]:
    """One length over all gradients that are there, averaged and corrected as the momentum is."""
    rates = list(lr) if isinstance(lr, Sequence) else [lr] * len(grads)
    x = [p.double().clone() for p in params]
    m, r, t = [torch.zeros_like(w) for w in x], [torch.zeros_like(w) for w in x], [0] * len(x)
    E = 0.0
    for number, (rate, row) in enumerate(zip(rates, grads, strict=True)):
        D: dict[int, Tensor] = {}
        length = 0.0
        for i, g in enumerate(row):
            if g is not None:
                t[i] += 1
                r[i] = beta_rms * r[i] + (1 - beta_rms) * g.double() ** 2
                D[i] = torch.sqrt(r[i] / (1 - beta_rms ** t[i])) + eps if variant == "rms" else torch.ones_like(x[i])
                length += xi * float((g.double() ** 2 / D[i]).sum())
        E = beta * E + (1 - beta) * length
        corrected = E / (1 - beta ** (number + 1))
        factor = losses[number] / (losses[number] ** 2 + corrected) if variant == "log" else 1 / (1 + corrected)
        for i, g in enumerate(row):
            if g is not None:
                m[i] = momentum * m[i] + (1 - momentum) * g.double()
                direction = m[i] / (1 - momentum ** t[i]) / D[i]
                x[i] = (1 - rate * weight_decay) * x[i] - rate * factor * direction
    return x


def flat(tensors: Sequence[Tensor | None]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors if t is not None])


def moved(
    opt: torch.optim.Optimizer, params: Sequence[Tensor], row: Sequence[Tensor | None], lr: float, loss: float = 1.0
) -> Tensor:
    """The direction of one step, as one vector."""
    before = flat(params).clone()
    for p, g in zip(params, row, strict=True):
        p.grad = g
    opt.step(lambda: loss)
    return (before - flat(params)) / lr


@pytest.mark.parametrize("hyper", CASES, ids=["defaults", "others", "rms", "rms, others"])
def test_sixty_steps_equal_the_formula(hyper: dict[str, Any]) -> None:
    start, grads = draw([(16, 8), (16,)], 60, missing=[(3, 0), (7, 1)])
    params = leaves(start)
    assert distance(play(optimizer(params, lr=0.1, **hyper), params, grads), reference(start, grads, lr=0.1, **hyper)) < 1e-12


def test_sixty_steps_of_the_logarithm_equal_the_formula() -> None:
    start, grads = draw([(16, 8), (16,)], 60)
    losses = [2.0 / (1 + t) for t in range(60)]
    params = leaves(start)
    opt = optimizer(params, lr=0.1, variant="log", weight_decay=0.1)
    for row, loss in zip(grads, losses, strict=True):
        moved(opt, params, row, 0.1, loss)
    assert distance(params, reference(start, grads, lr=0.1, variant="log", weight_decay=0.1, losses=losses)) < 1e-12


def test_without_xi_it_is_sgd_with_a_corrected_average_for_momentum() -> None:
    start, grads = draw([(16, 8)], 30)
    params = leaves(start)
    found = play(optimizer(params, lr=0.1, xi=0.0, momentum=0.7, weight_decay=0.2), params, grads)
    x, m = start[0], torch.zeros_like(start[0])
    for t, (g,) in enumerate(grads, 1):
        assert g is not None
        m = 0.7 * m + 0.3 * g
        x = (1 - 0.1 * 0.2) * x - 0.1 * m / (1 - 0.7**t)
    assert distance(found, [x]) < 1e-14


def test_without_xi_the_rms_variant_is_adamw_decay_included() -> None:
    start, grads = draw(SHAPES, 40, missing=[(5, 1)])
    a, b = leaves(start), leaves(start)
    found = play(optimizer(a, lr=1e-2, xi=0.0, momentum=0.9, beta_rms=0.99, weight_decay=0.2, variant="rms"), a, grads)
    assert distance(found, play(AdamW(b, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.2, backend="eager"), b, grads)) < 1e-14


@pytest.mark.parametrize("xi", [1e-3, 0.1, 5.0])
def test_without_averages_it_solves_with_the_metric_of_the_graph(xi: float) -> None:
    """(I + xi g g^T)^-1 g, over all parameters as one vector."""
    _, (row,) = draw(SHAPES, 1)
    params, g = zeros(*SHAPES), flat(row)
    found = moved(optimizer(params, lr=1.0, xi=xi, beta=0.0, momentum=0.0), params, row, 1.0)
    wanted = torch.linalg.solve(torch.eye(18, dtype=torch.float64) + xi * torch.outer(g, g), g)
    assert (found - wanted).abs().max() < 1e-15


@pytest.mark.parametrize("loss", [0.02, 1.0, 7.0])
def test_the_logarithm_solves_with_the_metric_of_its_own_graph(loss: float) -> None:
    """The gradient of log L is g / L: `L (L^2 I + xi g g^T)^-1 g` = `(I + xi h h^T)^-1 h` for h = g / L."""
    _, (row,) = draw(SHAPES, 1)
    params, h = zeros(*SHAPES), flat(row) / loss
    found = moved(optimizer(params, lr=1.0, xi=0.1, beta=0.0, momentum=0.0, variant="log"), params, row, 1.0, loss)
    wanted = torch.linalg.solve(torch.eye(18, dtype=torch.float64) + 0.1 * torch.outer(h, h), h)
    assert (found - wanted).abs().max() < 1e-14


def test_after_any_positive_preconditioner_the_link_solves_with_it() -> None:
    """(D + xi g g^T)^-1 g, with D a number for each entry, given or Adam's."""
    start, grads = draw(SHAPES, 5)
    fixed, learned = leaves(start), leaves(start)
    links = [apply(lambda u, state, x, k: u / (1 + u.abs())), adam((0.0, 0.9), eps=0.01)]
    a, b = (
        Optimizer(params, chain(link, induced_metric(xi=0.3, beta=0.0)), lr=1.0, backend="eager")
        for params, link in zip((fixed, learned), links, strict=True)
    )
    v = torch.zeros(18, dtype=torch.float64)
    for t, row in enumerate(grads, 1):
        g = flat(row)
        v = 0.9 * v + 0.1 * g**2
        for opt, params, D in ((a, fixed, 1 + g.abs()), (b, learned, torch.sqrt(v / (1 - 0.9**t)) + 0.01)):
            wanted = torch.linalg.solve(torch.diag(D) + 0.3 * torch.outer(g, g), g)
            assert (moved(opt, params, row, 1.0) - wanted).abs().max() < 1e-14


def test_the_rms_variant_solves_with_the_metric_of_rmsprop() -> None:
    start, grads = draw(SHAPES, 5)
    params, r = leaves(start), torch.zeros(18, dtype=torch.float64)
    opt = optimizer(params, lr=1.0, xi=0.3, beta=0.0, momentum=0.0, beta_rms=0.8, variant="rms")
    for t, row in enumerate(grads, 1):
        g = flat(row)
        r = 0.8 * r + 0.2 * g**2
        D = torch.sqrt(r / (1 - 0.8**t)) + 1e-8
        wanted = torch.linalg.solve(torch.diag(D) + 0.3 * torch.outer(g, g), g)
        assert (moved(opt, params, row, 1.0) - wanted).abs().max() < 1e-14


@pytest.mark.parametrize("xi", [1e-4, 0.1, 3.0])
def test_no_gradient_moves_further_than_lr_over_two_roots_of_xi(xi: float) -> None:
    """And the furthest is one of length 1 / sqrt(xi)."""
    start, (row,) = draw(SHAPES, 1)
    unit = [g / flat(row).norm() for g in row if g is not None]
    steps = {}
    for factor in (1e-6, 0.1, 0.9, 1.0, 1.1, 10.0, 1e6):
        params = leaves(start)
        opt = optimizer(params, lr=1.0, xi=xi, beta=0.0, momentum=0.0)
        steps[factor] = float(moved(opt, params, [g * factor / math.sqrt(xi) for g in unit], 1.0).norm())
    bound = 1 / (2 * math.sqrt(xi))
    assert steps[1.0] == pytest.approx(bound, rel=1e-12)
    assert all(step < bound for factor, step in steps.items() if factor != 1.0)


def test_a_product_made_negative_by_momentum_lengthens_no_step() -> None:
    start, (row,) = draw(SHAPES, 1)
    params = leaves(start)
    turned = apply(lambda u, state, x, k: -u)
    opt = Optimizer(params, chain(turned, induced_metric(xi=10.0, beta=0.0)), lr=1.0, backend="eager")
    assert (moved(opt, params, row, 1.0) + flat(row)).abs().max() < 1e-14


def test_two_groups_share_one_length_and_each_counts_with_its_own_xi() -> None:
    _, (row,) = draw(SHAPES, 1)
    params, g = zeros(*SHAPES), [t for t in row if t is not None]
    groups = [{"params": params[:1]}, {"params": params[1:], "xi": 0.5}]
    found = moved(optimizer(groups, lr=1.0, xi=0.1, momentum=0.0), params, row, 1.0)
    length = 0.1 * float(g[0].square().sum()) + 0.5 * float(g[1].square().sum() + g[2].square().sum())
    assert (found - flat(row) / (1 + length)).abs().max() < 1e-15


def test_huge_float32_gradients_give_small_steps_and_not_nan() -> None:
    """Their squares overflow float32: 1 / (1 + inf) would be 0, or inf * 0 not a number."""
    params = leaves([torch.zeros(64, 128)])
    found = moved(optimizer(params, lr=1.0, xi=1e-30, beta=0.0, momentum=0.0), params, [torch.full((64, 128), 1e20)], 1.0)
    assert float(found[0]) == pytest.approx(1e20 / (1 + 1e-30 * 1e40 * 8192), rel=1e-5)


def test_the_logarithm_without_a_loss_is_refused_before_anything_changes() -> None:
    start, grads = draw(SHAPES, 2)
    params, twin = leaves(start), leaves(start)
    opt, other = optimizer(params, lr=0.1, variant="log"), optimizer(twin, lr=0.1, variant="log")
    for p, g in zip(params, grads[0], strict=True):
        p.grad = g
    with pytest.raises(RuntimeError, match="closure"):
        opt.step()
    for loss in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="positive"):
            opt.step(lambda loss=loss: torch.tensor(loss))
    assert same(params, start)
    for row in grads:
        assert torch.equal(moved(opt, params, row, 0.1, 0.5), moved(other, twin, row, 0.1, 0.5))


def test_a_plan_of_the_logarithm_takes_the_loss_for_1() -> None:
    start, (row,) = draw(SHAPES, 1)
    params = leaves(start)
    opt = optimizer(params, lr=0.1, variant="log")
    found = flat(list(opt.preview([g for g in row if g is not None]).values()))
    assert len(opt.plan()) == 3
    assert (found + 0.1 * moved(opt, params, row, 0.1, 1.0)).abs().max() < 1e-15


@pytest.mark.parametrize(
    "name, value",
    [
        ("lr", -0.1),
        ("momentum", 1.0),
        ("xi", -0.1),
        ("beta", 1.0),
        ("variant", "sqrt"),
        ("beta_rms", 1.0),
        ("eps", -1.0),
        ("weight_decay", -0.1),
    ],
)
def test_an_impossible_setting_is_refused_by_name(name: str, value: Any) -> None:
    hyper: dict[str, Any] = {"variant": "rms", name: value}
    with pytest.raises(ValueError, match=name):
        optimizer(leaves(draw([(4, 4)], 0)[0]), **hyper)


def test_an_impossible_length_is_refused_by_name() -> None:
    length: Any = "weight"
    with pytest.raises(ValueError, match="length"):
        induced_metric(length=length)
