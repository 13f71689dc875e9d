"""Lion-K (Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts, arXiv 2310.05898)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from conformance.problems import Grads, distance, draw, leaves, play, same
from optim.references import polar
from torch import Tensor

from poise.linalg.kappa import Kappa
from poise.optim import SGD, Lion, LionK, Muon
from poise.optim.rules.lionk import continuous_time, lyapunov

# Mathematics needs no compiler; that compiled mathematics is the same is shown for all rules at once in tests/conformance.
lion_k = partial(LionK, backend="eager")

MATRIX = ("nuclear", "l21", "spectral", "l2inf")
CASES: list[dict[str, Any]] = [
    {},
    {"kappa": "nuclear", "method": "ns5", "weight_decay": 0.3, "rest_kappa": "l2", "rest_lr": 0.05, "rest_weight_decay": 0.2},
    {"kappa": "l21", "betas": (0.5, 0.8), "rest_kappa": "softsign", "rest_lr": 0.02, "delta": 0.3},
    {"kappa": "l1", "weight_decay": 0.3},
    {"kappa": "l2", "betas": (0.95, 0.98)},
    {"kappa": "squared_l2", "weight_decay": 0.1},
    {"kappa": "huber", "delta": 0.2},
    {"kappa": "softsign", "delta": 0.5, "betas": (0.5, 0.9)},
    {"kappa": "logcosh", "delta": 0.1},
    {"kappa": "top_k", "top": 0.25},
    {"kappa": "linf"},
    {"kappa": "spectral"},
]


def gradient(c: Tensor, kappa: str, delta: float, top: float, method: str, steps: int | None) -> Tensor:
    """The gradient of each kappa as the paper's table and its examples have it."""
    if kappa in MATRIX:
        rows = c.reshape(len(c), -1)
        if kappa == "nuclear":
            return polar(rows, method, steps).reshape(c.shape)
        if kappa == "l21":
            return torch.stack([row / row.norm() for row in rows]).reshape(c.shape)
        u, _, vh = torch.linalg.svd(rows, full_matrices=False)
        return torch.outer(u[:, 0], vh[0]).reshape(c.shape)
    if kappa == "l1":
        return c.sign()
    if kappa == "l2":
        return c / c.norm()
    if kappa == "squared_l2":
        return c
    if kappa == "huber":
        return torch.where(c.abs() <= delta, c / delta, c.sign())
    if kappa == "softsign":
        return c / (c.abs() + delta)
    if kappa == "logcosh":
        return (torch.exp(2 * c / delta) - 1) / (torch.exp(2 * c / delta) + 1) if delta > 0.02 else torch.tanh(c / delta)
    largest = sorted(range(c.numel()), key=lambda i: -abs(float(c.flatten()[i])))
    moved = largest[:1] if kappa == "linf" else largest[: math.ceil(top * c.numel())]
    step = torch.zeros(c.numel(), dtype=c.dtype)
    for i in moved:
        step[i] = c.flatten()[i].sign()
    return step.reshape(c.shape)


def reference(
    params: Sequence[Tensor],
    grads: Grads,
    *,
    lr: float | Sequence[float],
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    kappa: str = "nuclear",
    delta: float = 1e-3,
    top: float = 0.1,
    method: str = "polar_express",
    steps: int | None = None,
    rest_kappa: str = "l1",
    rest_lr: float = 1e-4,
    rest_weight_decay: float = 0.0,
) -> list[Tensor]:
    """Decay, a step along the gradient of kappa at one average, and only then the other average takes the gradient in."""
    rates = list(lr) if isinstance(lr, Sequence) else [lr] * len(grads)
    ends = []
    for i, start in enumerate(params):
        x = start.double().clone()
        m = torch.zeros_like(x)
        rest = kappa in MATRIX and x.ndim < 2
        for rate, row in zip(rates, grads, strict=True):
            given = row[i]
            if given is None:
                continue
            g = given.double()
            eta, wd = (rest_lr * rate / rates[0], rest_weight_decay) if rest else (rate, weight_decay)
            c = betas[0] * m + (1 - betas[0]) * g
            x = (1 - eta * wd) * x - eta * gradient(c, rest_kappa if rest else kappa, delta, top, method, steps)
            m = betas[1] * m + (1 - betas[1]) * g
        ends.append(x)
    return ends


@pytest.mark.parametrize("hyper", CASES, ids=[str(case.get("kappa", "defaults")) for case in CASES])
def test_fifteen_steps_equal_the_formula(hyper: dict[str, Any]) -> None:
    start, grads = draw([(6, 9), (8,), (4, 2, 3, 3)], 15)
    params = leaves(start)
    assert distance(play(lion_k(params, lr=0.01, **hyper), params, grads), reference(start, grads, lr=0.01, **hyper)) < 1e-11


def test_with_the_l1_norm_it_is_lion_bit_for_bit() -> None:
    start, grads = draw([(16, 8), (16,)], 40, dtype=torch.float32)
    ours, lions = leaves(start), leaves(start)
    hyper: dict[str, Any] = dict(lr=0.01, betas=(0.95, 0.98), weight_decay=0.3)
    assert same(play(lion_k(ours, kappa="l1", **hyper), ours, grads), play(Lion(lions, backend="eager", **hyper), lions, grads))


def test_with_the_nuclear_norm_and_one_beta_it_is_muon_bit_for_bit() -> None:
    start, grads = draw([(16, 8), (8, 16)], 20, dtype=torch.float32)
    ours, muons = leaves(start), leaves(start)
    hyper: dict[str, Any] = dict(lr=0.02, weight_decay=0.3, backend="eager")
    muon = Muon(muons, momentum=0.9, nesterov=False, scale_rule="none", **hyper)
    assert same(play(LionK(ours, betas=(0.9, 0.9), **hyper), ours, grads), play(muon, muons, grads))


def test_the_look_ahead_of_nesterov_is_a_first_beta_of_the_second_one_squared() -> None:
    start, grads = draw([(16, 8)], 20)
    ours, muons = leaves(start), leaves(start)
    muon = Muon(muons, lr=0.02, momentum=0.9, scale_rule="none", method="svd", backend="eager")
    found = play(lion_k(ours, lr=0.02, betas=(0.81, 0.9), method="svd"), ours, grads)
    assert distance(found, play(muon, muons, grads)) < 1e-12


def test_with_half_the_square_and_one_beta_it_is_momentum() -> None:
    start, grads = draw([(16, 8)], 20)
    ours, theirs = leaves(start), leaves(start)
    found = play(lion_k(ours, lr=0.1, betas=(0.9, 0.9), kappa="squared_l2", weight_decay=0.2), ours, grads)
    sgd = SGD(theirs, lr=0.01, momentum=0.9, weight_decay=2.0, decay="coupled", backend="eager")
    assert distance(found, play(sgd, theirs, grads)) < 1e-13


def excess(x: Tensor, kappa: str, lam: float) -> Tensor:
    """How far outside of its constraint x is: of each entry, or of each singular value, the largest."""
    sizes = x.abs() if kappa == "l1" else torch.linalg.svdvals(x)
    return (lam * sizes - 1).clamp_min(0)


@pytest.mark.parametrize("kappa", ["l1", "nuclear"])
def test_what_lies_outside_of_the_constraint_shrinks_by_its_rate_whatever_the_gradients(kappa: str) -> None:
    """By 1 - lr lam = 0.995 a step, each entry by itself under l1; of the spectral norm, its excess over 1 / lam."""
    lr, lam = 0.01, 0.5
    (start,), grads = draw([(12, 8)], 60)
    params = leaves([20 * start])
    opt = lion_k(params, lr=lr, weight_decay=lam, kappa=kappa, method="svd")
    worst = 0.0
    before = excess(params[0].detach(), kappa, lam)
    for t, row in enumerate(grads):
        against = [-params[0].detach() if t % 2 else row[0]]  # also the gradient that pushes outwards
        after = excess(play(opt, params, [against])[0], kappa, lam)
        if kappa == "nuclear":
            before, after = before.max(), after.max()
        outside = before > 0
        assert bool((after[outside] <= (1 - lr * lam) * before[outside] + 1e-13).all())
        worst = max(worst, float((after[outside] / before[outside]).max()))
        assert bool((after[~outside] < 1e-13).all())
        before = after
    assert worst > 0.98  # the bound is met, not just kept


def test_on_a_box_that_binds_it_ends_where_projected_gradients_do() -> None:
    lam, lr = 0.5, 0.01
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(20, 30, generator=generator, dtype=torch.float64)
    A, b = root @ root.T / 30 + 0.1 * torch.eye(20).double(), 6 * torch.randn(20, generator=generator, dtype=torch.float64)

    def loss(x: Tensor) -> float:
        return float(0.5 * x @ A @ x - b @ x)

    best = torch.zeros(20, dtype=torch.float64)
    for _ in range(3000):
        best = (best - 0.2 * (A @ best - b)).clamp(-1 / lam, 1 / lam)
    assert 10 < int((best.abs() > 1 / lam - 1e-9).sum()) < 20  # it binds, and not everywhere

    params = leaves([torch.zeros(20, dtype=torch.float64)])
    opt = lion_k(params, lr=lr, weight_decay=lam, kappa="l1")
    for _ in range(3000):
        play(opt, params, [[A @ params[0].detach() - b]])
    x = params[0].detach()
    assert float(x.abs().max()) <= 1 / lam + 1e-12
    gap = loss(x) - loss(best)
    assert -1e-3 < gap < 1e-2 * abs(loss(best)) * lr
    assert distance([x], [best]) < 5 * lr


@pytest.mark.parametrize("name", ["squared_l2", "l1", "huber", "softsign", "logcosh"])
def test_the_lyapunov_function_never_rises_along_the_flow(name: str) -> None:
    """A fine Euler integration; the sign of the coupling, or another constant before it, makes it rise."""
    alpha, gamma, epsilon, lam, h = 1.5, 0.8, 0.9, 0.4, 1e-3
    kappa = Kappa(name, delta=0.5)
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    A = root @ root.T / 6 + 0.2 * torch.eye(6).double()
    target = 4 * torch.randn(1, 6, generator=generator, dtype=torch.float64)
    x = torch.randn(1, 6, generator=generator, dtype=torch.float64).clamp(-1, 1) / lam * 0.9
    m = torch.randn(1, 6, generator=generator, dtype=torch.float64)
    values = []
    for _ in range(4000):
        g = (x - target) @ A
        loss = 0.5 * ((x - target) @ A * (x - target)).sum()
        values.append(lyapunov(loss, [x], [m], kappa, weight_decay=lam, alpha=alpha, gamma=gamma, epsilon=epsilon))
        drift = alpha * g - gamma * m
        x, m = x - h * (kappa.gradient(m + epsilon * drift) + lam * x), m + h * drift
    rises = torch.stack(values).diff()
    # a sign that flips about zero makes steps of length h, and each of them may raise H by about their square
    assert float(rises.max()) < (1e-9 if name == "squared_l2" else 5e-5)
    assert float(values[-1]) < float(values[0]) - 1.0


def test_the_lyapunov_function_falls_while_the_optimizer_trains() -> None:
    """Its own buffer is what the flow calls m, and `continuous_time` gives its constants."""
    hyper: dict[str, Any] = dict(lr=1e-2, betas=(0.9, 0.98), weight_decay=0.5)
    (start, target), _ = draw([(6, 4), (6, 4)], 0)
    params = leaves([start.clamp(-1.9, 1.9)])
    opt = lion_k(params, kappa="squared_l2", **hyper)
    constants = continuous_time(hyper["lr"], hyper["betas"])
    assert constants["epsilon"] * constants["gamma"] == pytest.approx(1 - hyper["betas"][0])
    values = []
    for _ in range(1000):
        x = params[0].detach()
        m = opt.state[params[0]]["exp_avg"]
        loss = 0.5 * (x - target).square().sum()
        values.append(lyapunov(loss, [x], [m], "squared_l2", weight_decay=hyper["weight_decay"], **constants))
        play(opt, params, [[x - target]])
    assert float(torch.stack(values).diff().max()) < 0
    x, m = params[0].detach(), opt.state[params[0]]["exp_avg"]
    assert distance([x], [target / 1.5]) < 0.05  # min f + lam x^2 / 2


def test_weights_outside_of_the_constraint_have_no_finite_value() -> None:
    x, m = torch.full((2, 3), 2.1), torch.zeros(2, 3)
    constants: dict[str, float] = dict(weight_decay=0.5, alpha=1.0, gamma=1.0, epsilon=0.1)
    assert math.isinf(float(lyapunov(0.0, [x], [m], "l1", **constants)))
    assert math.isinf(float(lyapunov(0.0, [x], [m], "nuclear", **constants)))
    assert float(lyapunov(3.0, [0.0 * x], [m], "l1", **constants)) == 3.0
    assert float(lyapunov(3.0, [x], [m], "l1", **{**constants, "weight_decay": 0.0})) == 3.0


def test_values_of_several_tensors_add_up() -> None:
    (x, y), ((m, n),) = draw([(2, 3), (4,)], 1)
    assert m is not None and n is not None
    constants: dict[str, float] = dict(weight_decay=0.1, alpha=1.0, gamma=0.7, epsilon=0.3)
    parts = [lyapunov(0.0, [a], [b], "squared_l2", **constants) for a, b in ((x, m), (y, n))]
    both = lyapunov(2.0, [x, y], [m, n], "squared_l2", **constants)
    assert float(both) == pytest.approx(2.0 + float(sum(parts)))
    with pytest.raises(ValueError, match="epsilon=2"):
        lyapunov(0.0, [x], [m], "l1", weight_decay=0.1, alpha=1.0, gamma=1.0, epsilon=2.0)
    with pytest.raises(ValueError, match="gamma"):
        lyapunov(0.0, [x], [m], "l1", weight_decay=0.1, alpha=1.0, gamma=-1.0, epsilon=0.1)


def test_a_model_s_matrices_get_one_kappa_and_its_other_weights_the_other() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(30, 16), torch.nn.Linear(16, 24), torch.nn.ReLU(), torch.nn.Linear(24, 30))
    before = [p.detach().clone() for p in model.parameters()]
    opt = lion_k(model, lr=0.5, method="svd", rest_lr=0.25)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    opt.step()
    moved = [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]
    assert torch.linalg.svdvals(moved[1]).sub(0.5).abs().max() < 1e-4
    for other in (0, 2, 3, 4):
        assert torch.allclose(moved[other].abs(), torch.full_like(moved[other], 0.25), atol=1e-5)


def test_delta_belongs_to_the_groups_so_that_it_can_be_scheduled() -> None:
    start, grads = draw([(4, 3)], 4)
    params = leaves(start)
    opt = lion_k(params, lr=0.01, kappa="huber", delta=0.5)
    for group in opt.param_groups:
        group["delta"] = 0.1
    assert distance(play(opt, params, grads), reference(start, grads, lr=0.01, kappa="huber", delta=0.1)) < 1e-14


@pytest.mark.parametrize(
    "name, value",
    [
        ("lr", -1e-3),
        ("betas", (1.0, 0.99)),
        ("weight_decay", -0.1),
        ("kappa", "l3"),
        ("delta", 0.0),
        ("top", 2.0),
        ("method", "newton"),
        ("rest_kappa", "nuclear"),
        ("rest_kappa", "l3"),
        ("rest_lr", -1.0),
        ("rest_weight_decay", -1.0),
    ],
)
def test_an_impossible_setting_is_refused_by_name(name: str, value: Any) -> None:
    hyper: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match="kappa" if name == "rest_kappa" else name):
        lion_k(leaves(draw([(4, 4)], 0)[0]), **hyper)
