"""PolarGrad (arXiv 2505.21799)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from conformance.cases import batch, loss_of, net
from conformance.problems import Grads, distance, draw, leaves, play, same
from optim.references import adamw
from torch import Tensor, nn

from poise.linalg.polar import METHODS, orthogonalize
from poise.optim import Muon, PolarGrad

# Mathematics needs no compiler; that compiled mathematics is the same is shown for all rules at once in tests/conformance.
polargrad = partial(PolarGrad, backend="eager")

CASES: list[dict[str, Any]] = [
    {},
    {"polar_first": True, "momentum": 0.7, "weight_decay": 0.3, "adamw_weight_decay": 0.3},
    {"momentum": 0.0, "adamw_lr": 1e-2},
    {"method": "svd", "momentum": 0.5, "adamw_betas": (0.8, 0.9), "adamw_eps": 1e-3},
    {"inner_steps": 2, "momentum": 0.5},
    {"inner_steps": 3, "polar_first": True},
    {"method": "ns5"},
]


def factor(matrix: Tensor, method: str, steps: int | None) -> Tensor:
    """The polar factor by singular values, each moved as the method moves it."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    if method == "ns5":
        s = s / s.norm()
        for _ in range(steps or 5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        return (u * s) @ vh
    if method == "svd" or steps is None:
        return u @ vh
    s = s / math.sqrt(float(torch.linalg.matrix_norm(matrix, 1) * torch.linalg.matrix_norm(matrix, math.inf)))
    l = eps = torch.finfo(torch.float64).eps
    for _ in range(steps):
        if l + 5 * eps >= 1:
            break
        d = (4 * (1 / l**2 - 1) / l**2) ** (1 / 3)
        a = math.sqrt(1 + d) + math.sqrt(2 - d + 2 * (2 - l**2) / (l**2 * math.sqrt(1 + d)))
        b = (a - 1) ** 2 / 4
        c = a + b - 1
        s, l = s * (a + b * s**2) / (1 + c * s**2), l * (a + b * l**2) / (1 + c * l**2)
    return (u * (1.5 * s - 0.5 * s**3)) @ vh


def reference(
    params: Sequence[Tensor],
    grads: Grads,
    *,
    lr: float | Sequence[float],
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    polar_first: bool = False,
    method: str = "qdwh",
    inner_steps: int | None = None,
    adamw_lr: float = 3e-4,
    adamw_betas: tuple[float, float] = (0.9, 0.95),
    adamw_eps: float = 1e-10,
    adamw_weight_decay: float = 0.0,
) -> list[Tensor]:
    """Matrices by the paper's two algorithms, vectors by AdamW."""
    rates = list(lr) if isinstance(lr, Sequence) else [lr] * len(grads)
    ends = []
    for i, start in enumerate(params):
        gradients = [row[i] for row in grads]
        if start.ndim < 2:
            others = [adamw_lr * rate / rates[0] for rate in rates]
            ends.append(adamw(start, gradients, others, adamw_betas, adamw_eps, adamw_weight_decay))
            continue
        w = start.double().clone()
        buffer = torch.zeros_like(w)
        for rate, gradient in zip(rates, gradients, strict=True):
            if gradient is None:
                continue
            g = gradient.double()
            if polar_first:
                u = factor(g.reshape(len(g), -1), method, inner_steps).reshape(g.shape)
                nu = (g * u).sum()
                buffer = momentum * buffer + (1 - momentum) * u
                step = nu * buffer
            else:
                buffer = momentum * buffer + (1 - momentum) * g
                u = factor(buffer.reshape(len(g), -1), method, inner_steps).reshape(g.shape)
                step = (buffer * u).sum() * u
            w = (1 - rate * weight_decay) * w - rate * step
        ends.append(w)
    return ends


@pytest.mark.parametrize("hyper", CASES, ids=[str(case) for case in CASES])
def test_twelve_steps_equal_the_formula(hyper: dict[str, Any]) -> None:
    start, grads = draw([(12, 20), (20, 12), (12,), (8, 2, 3, 3), ()], 12)
    params = leaves(start)
    assert distance(play(polargrad(params, lr=0.02, **hyper), params, grads), reference(start, grads, lr=0.02, **hyper)) < 1e-9


@pytest.mark.parametrize("polar_first", [False, True])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (8, 2, 3, 3)])
def test_without_momentum_the_step_is_the_sum_of_singular_values_times_the_polar_factor(
    polar_first: bool, shape: tuple[int, ...]
) -> None:
    _, ((g,),) = draw([shape], 1)
    assert g is not None
    params = leaves([torch.zeros_like(g)])
    step = -play(polargrad(params, lr=0.3, momentum=0.0, polar_first=polar_first), params, [[g]])[0]
    sigma = torch.linalg.svdvals(g.reshape(len(g), -1))
    assert torch.linalg.svdvals(step.reshape(len(g), -1)).div(0.3 * sigma.sum()).sub(1).abs().max() < 1e-10
    assert float((g * step).sum()) == pytest.approx(0.3 * float(sigma.sum()) ** 2, rel=1e-10)


def test_the_two_orders_are_one_without_momentum_and_two_with_it() -> None:
    start, grads = draw([(12, 20)], 6)

    def end(**hyper: Any) -> list[Tensor]:
        params = leaves(start)
        return play(polargrad(params, lr=0.02, **hyper), params, grads)

    assert same(end(momentum=0.0), end(momentum=0.0, polar_first=True))
    assert distance(end(), end(polar_first=True)) > 1e-2


def test_directions_are_muon_s_and_lengths_are_the_gradient_s() -> None:
    """A gradient c times as large moves it c times as far, and Muon not at all further."""
    _, ((g,),) = draw([(12, 20)], 1)
    assert g is not None

    def step(make: Any, scale: float) -> Tensor:
        params = leaves([torch.zeros_like(g)])
        return play(make(params, lr=1.0, momentum=0.5, method="svd"), params, [[scale * g]])[0]

    ours, muons = polargrad, partial(Muon, nesterov=False, scale_rule="none", backend="eager")
    assert torch.allclose(step(ours, 8.0), 8.0 * step(ours, 1.0), rtol=1e-12)
    assert torch.allclose(step(ours, 1.0), float(torch.linalg.svdvals(0.5 * g).sum()) * step(muons, 1.0), atol=1e-10)
    assert torch.allclose(step(muons, 8.0), step(muons, 1.0), atol=1e-12)


def quadratic(make: Any, lr: float, steps: int) -> tuple[list[float], float]:
    """Losses above the least one of ||A X B - C||^2 / 2 with a constant lr, and the first of them."""
    generator = torch.Generator().manual_seed(0)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    A, B, C = gaussian(60, 20), gaussian(12, 40), gaussian(60, 40)
    least = 0.5 * float((A @ torch.linalg.pinv(A) @ C @ torch.linalg.pinv(B) @ B - C).square().sum())
    L = float(torch.linalg.matrix_norm(A, 2) ** 2 * torch.linalg.matrix_norm(B, 2) ** 2)
    params = leaves([torch.zeros(20, 12, dtype=torch.float64)])
    opt = make(params, lr=lr or 1 / (L * 12))
    losses = []
    for _ in range(steps):
        error = A @ params[0].detach() @ B - C
        losses.append(0.5 * float(error.square().sum()) - least)
        params[0].grad = A.T @ error @ B.T
        opt.step()
    return losses, least


def test_with_a_constant_rate_it_keeps_converging_where_muon_stalls() -> None:
    losses, least = quadratic(partial(polargrad, momentum=0.0, method="svd"), 0.0, 1500)
    assert all(after < before for before, after in pairwise(losses))
    assert losses[-1] < 2e-4 * least
    assert losses[-1] < 0.5 * losses[1000]
    muon = partial(Muon, momentum=0.0, nesterov=False, scale_rule="none", method="svd", backend="eager")
    floors = {}
    for lr in (0.1, 0.01):
        tail = quadratic(muon, lr, 600)[0]
        floors[lr] = sum(tail[-100:]) / 100
        assert floors[lr] == pytest.approx(sum(tail[-200:-100]) / 100, rel=0.01)  # it has come to a floor
    assert floors[0.1] / floors[0.01] == pytest.approx(100, rel=0.1)  # proportional to lr squared
    assert floors[0.01] > 3 * losses[-1]


def test_qdwh_is_exact_where_ns5_is_far_off() -> None:
    """Relative to the exact factor, at condition number 1e6."""
    (left, right), _ = draw([(24, 24), (24, 24)], 0)
    u, v = torch.linalg.qr(left).Q, torch.linalg.qr(right).Q
    M = (u * torch.logspace(0, -6, 24, dtype=torch.float64)) @ v.T
    exact = orthogonalize(M, "svd")
    off = {method: float((orthogonalize(M, method) - exact).norm() / exact.norm()) for method in ("qdwh", "ns5")}
    assert off["qdwh"] < 1e-11
    assert off["ns5"] > 0.1
    assert float((exact - u @ v.T).norm() / exact.norm()) < 1e-10  # known to eps times the condition, whatever the method


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("polar_first", [False, True])
def test_every_registered_method_can_be_named_and_comes_near(method: str, polar_first: bool) -> None:
    start, grads = draw([(12, 20)], 3)
    ends = []
    for name in (method, "svd"):
        params = leaves(start)
        ends.append(play(polargrad(params, lr=0.02, method=name, polar_first=polar_first), params, grads)[0] - start[0])
    assert float((ends[0] - ends[1]).norm() / ends[1].norm()) < (1e-10 if method == "qdwh" else 0.5)


def test_the_default_is_the_exact_factor_and_two_inner_steps_are_not() -> None:
    _, ((g,),) = draw([(12, 20)], 1, dtype=torch.float32)
    assert g is not None
    exact = torch.linalg.svdvals(g).sum()
    attained = {}
    for steps in (None, 2, 3):
        params = leaves([torch.zeros_like(g)])
        step = -play(polargrad(params, lr=1.0, momentum=0.0, inner_steps=steps), params, [[g]])[0]
        attained[steps] = float((g * step).sum().sqrt() / exact)
    assert abs(attained[None] - 1) < 1e-6
    assert attained[2] < 0.98
    assert abs(attained[3] - 1) < 1e-3


@pytest.mark.parametrize("polar_first", [False, True])
def test_each_part_of_a_fused_projection_has_its_own_length(polar_first: bool) -> None:
    """q, k and v stored as one matrix move as three."""
    attention = nn.MultiheadAttention(8, 2, bias=False, dtype=torch.float64)
    model = nn.Sequential(attention, nn.Linear(8, 3, dtype=torch.float64))
    weight = attention.in_proj_weight
    assert weight is not None
    before = weight.detach().clone()
    g = torch.randn(24, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.tensor(
        [[1.0]] * 8 + [[10.0]] * 8 + [[100.0]] * 8, dtype=torch.float64
    )
    weight.grad = g.clone()
    polargrad(model, lr=1.0, momentum=0.5, polar_first=polar_first, method="svd").step()
    for part, moved in zip(g.split(8), (before - weight.detach()).split(8), strict=True):
        u, s, vh = torch.linalg.svd(part)
        assert distance([moved], [0.5 * s.sum() * u @ vh]) < 1e-9


def test_training_goes_on_in_every_state_format() -> None:
    first, losses = float(loss_of(net(), batch(512, seed=1000))), {}
    for state in ("fp32", "bf16", "int8", "int4"):
        model = net()
        opt = polargrad(model, lr=0.06, state=state)
        for step in range(40):
            opt.zero_grad()
            loss_of(model, batch(seed=step)).backward()
            opt.step()
        losses[state] = float(loss_of(model, batch(512, seed=1000)))
    assert losses["fp32"] < 0.85 * first
    assert min(first - loss for loss in losses.values()) > 0.9 * (first - losses["fp32"])


def test_zero_gradients_only_decay_the_weights() -> None:
    start, _ = draw([(24, 40), (24,)], 0)
    zeros: Grads = [[torch.zeros_like(p) for p in start] for _ in range(5)]
    for polar_first in (False, True):
        params = leaves(start)
        hyper: dict[str, Any] = dict(lr=0.1, weight_decay=0.5, adamw_weight_decay=0.2, polar_first=polar_first)
        found = play(polargrad(params, **hyper), params, zeros)
        assert distance(found, [start[0] * 0.95**5, start[1] * (1 - 3e-4 * 0.2) ** 5]) < 1e-13


@pytest.mark.parametrize("polar_first", [False, True])
@pytest.mark.parametrize(
    "name, value",
    [
        ("lr", -0.1),
        ("momentum", 1.0),
        ("momentum", -0.5),
        ("weight_decay", -0.1),
        ("method", "newton"),
        ("steps", 0),
        ("adamw_lr", -1.0),
        ("adamw_weight_decay", -1.0),
    ],
)
def test_an_impossible_setting_is_refused_by_name(polar_first: bool, name: str, value: Any) -> None:
    hyper: dict[str, Any] = {"inner_steps" if name == "steps" else name: value, "polar_first": polar_first}
    with pytest.raises(ValueError, match=name):
        polargrad(leaves(draw([(4, 4)], 0)[0]), **hyper)
