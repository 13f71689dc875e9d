"""The non-Euclidean trust-region method (arXiv 2503.12645)."""

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

from poise.linalg import norms
from poise.optim import Muon, Signum, TrustRegion

# Mathematics needs no compiler; that compiled mathematics is the same is shown for all rules at once in tests/conformance.
trust_region = partial(TrustRegion, backend="eager")

MATRIX = ("spectral", "nuclear", "l21", "l2inf")
CASES: list[dict[str, Any]] = [
    {},
    {"norm": "spectral", "method": "svd", "momentum": 0.8, "weight_decay": 0.3, "rest_norm": "l2", "rest_lr": 0.03},
    {"norm": "spectral", "lmo_first": True, "start": "zeros", "rest_weight_decay": 0.5, "rest_lr": 0.02},
    {"norm": "linf", "momentum": 0.7, "weight_decay": 0.1},
    {"norm": "l2", "start": "zeros"},
    {"norm": "global_l2", "momentum": 0.5},
    {"norm": "l1"},
    {"norm": "nuclear", "rest_norm": "global_l2", "rest_lr": 0.01},
    {"norm": "l21"},
    {"norm": "l2inf", "weight_decay": 0.2},
    {"norm": "spectral", "extrapolate": True, "momentum": 0.6, "weight_decay": 0.3, "rest_lr": 0.02},
    {"norm": "linf", "extrapolate": True},
]
# A first gradient that is taken whole is forgotten slowly, and what int4 rounded of it too: by 0.95 a step it is still a third
# of the average when the formats are compared, after 20 steps.
TYPICAL: dict[str, Any] = {"momentum": 0.8}


def furthest(m: Tensor, norm: str, method: str, steps: int | None) -> Tensor:
    """The point of the unit ball that goes furthest along m, from the definition of each norm."""
    if norm == "linf":
        return m.sign()
    if norm == "l2":
        return m / m.norm()
    if norm == "l1":
        i = int(m.abs().argmax())
        return torch.eye(m.numel(), dtype=m.dtype)[i].reshape(m.shape) * m.flatten()[i].sign()
    rows = m.reshape(len(m), -1)
    if norm == "spectral":
        point = polar(rows, method, steps)
    elif norm == "nuclear":
        u, _, vh = torch.linalg.svd(rows, full_matrices=False)
        point = u[:, :1] @ vh[:1]
    else:
        lengths = [float(row.norm()) for row in rows]
        longest = max(lengths)
        point = torch.stack(
            [row / a if norm == "l2inf" or a == longest else 0.0 * row for row, a in zip(rows, lengths, strict=True)]
        )
    return point.reshape(m.shape)


def reference(
    params: Sequence[Tensor],
    grads: Grads,
    *,
    lr: float | Sequence[float],
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    norm: str = "spectral",
    method: str = "polar_express",
    steps: int | None = None,
    start: str = "gradient",
    lmo_first: bool = False,
    rest_norm: str = "linf",
    rest_lr: float = 1e-4,
    rest_weight_decay: float = 0.0,
    extrapolate: bool = False,
) -> list[Tensor]:
    """The paper's algorithm; with `extrapolate` the points at which its gradients are asked for."""
    rates = list(lr) if isinstance(lr, Sequence) else [lr] * len(grads)
    a = 1 - momentum
    z = [p.double().clone() for p in params]
    asked = [w.clone() for w in z]
    m: list[Tensor | None] = [torch.zeros_like(w) if start == "zeros" else None for w in z]
    for rate, row in zip(rates, grads, strict=True):
        given = {i: g.double() for i, g in enumerate(row) if g is not None}
        steps_of: dict[int, Tensor] = {}
        for group in (True, False):
            mine = [i for i in given if (norm in MATRIX and z[i].ndim < 2) == group]
            ball = rest_norm if group else norm

            def toward(values: dict[int, Tensor], ball: str = ball) -> dict[int, Tensor]:
                if ball == "global_l2":
                    length = math.sqrt(sum(float(v.square().sum()) for v in values.values()))
                    return {i: v / length for i, v in values.items()}
                return {i: furthest(v, ball, method, steps) for i, v in values.items()}

            def averaged(values: dict[int, Tensor]) -> dict[int, Tensor]:
                new = {}
                for i, v in values.items():
                    old = m[i]
                    m[i] = new[i] = v if old is None else (1 - a) * old + a * v
                return new

            found = {i: given[i] for i in mine}
            steps_of |= averaged(toward(found)) if lmo_first else toward(averaged(found))
        for i in given:
            rest = norm in MATRIX and z[i].ndim < 2
            eta, wd = (rest_lr * rate / rates[0], rest_weight_decay) if rest else (rate, weight_decay)
            before = z[i]
            z[i] = (1 - eta * wd) * z[i] - eta * steps_of[i]
            asked[i] = z[i] + ((1 - a) / a * (z[i] - before) if extrapolate else 0.0)
    return asked


@pytest.mark.parametrize("hyper", CASES, ids=[str(i) + str(case.get("norm", "")) for i, case in enumerate(CASES)])
def test_fifteen_steps_equal_the_formula(hyper: dict[str, Any]) -> None:
    start, grads = draw([(6, 9), (8,), (4, 2, 3, 3)], 15)
    params = leaves(start)
    found = play(trust_region(params, lr=0.01, **hyper), params, grads)
    assert distance(found, reference(start, grads, lr=0.01, **hyper)) < 1e-11


def test_in_the_spectral_norm_it_is_muon_without_look_ahead_and_factor_of_shape_bit_for_bit() -> None:
    start, grads = draw([(16, 8), (8, 16), (8, 4, 3, 3)], 20, dtype=torch.float32)
    ours, muons = leaves(start), leaves(start)
    hyper: dict[str, Any] = dict(lr=0.02, momentum=0.9, weight_decay=0.3, method="svd", backend="eager")
    muon = Muon(muons, nesterov=False, scale_rule="none", **hyper)
    assert same(play(TrustRegion(ours, start="zeros", **hyper), ours, grads), play(muon, muons, grads))


def test_muon_that_begins_with_the_first_gradient_is_the_paper_s_own_start_bit_for_bit() -> None:
    """With a = 1/2 a buffer put at g_0 before the first step is g_0 after it, to the bit."""
    start, grads = draw([(16, 8)], 20, dtype=torch.float32)
    ours, muons = leaves(start), leaves(start)
    hyper: dict[str, Any] = dict(lr=0.02, momentum=0.5, method="svd", backend="eager")
    muon = Muon(muons, nesterov=False, scale_rule="none", **hyper)
    muon.state[muons[0]]["momentum_buffer"].copy_(grads[0][0])
    assert same(play(TrustRegion(ours, **hyper), ours, grads), play(muon, muons, grads))


def test_in_the_largest_entry_it_is_sign_descent_with_momentum_bit_for_bit() -> None:
    start, grads = draw([(16, 8), (5,)], 20, dtype=torch.float32)
    ours, signs = leaves(start), leaves(start)
    hyper: dict[str, Any] = dict(lr=0.02, momentum=0.9, weight_decay=0.3, backend="eager")
    assert same(
        play(TrustRegion(ours, norm="linf", start="zeros", **hyper), ours, grads), play(Signum(signs, **hyper), signs, grads)
    )


def test_in_the_euclidean_norm_it_is_normalized_momentum_bit_for_bit() -> None:
    """Cutkosky & Mehta's normalized SGD, which begins with the first gradient too."""
    (x,), grads = draw([(16, 8)], 20)
    params = leaves([x])
    found = play(trust_region(params, lr=0.125, momentum=0.75, norm="l2"), params, grads)
    m = torch.zeros_like(x)
    for t, (g,) in enumerate(grads):
        assert g is not None
        m = 0.75 * m + (1.0 if t == 0 else 0.25) * g
        power = 2.0 ** math.floor(math.log2(float(m.abs().max())))  # exact: only the range of the numbers
        whole = (m / power).reshape(1, -1)
        x = x - 0.125 * (whole / torch.linalg.vector_norm(whole, dim=(0, 1))).reshape(x.shape)
    assert same(found, [x])


def test_all_parameters_together_have_a_step_of_length_lr() -> None:
    start, grads = draw([(6, 4), (5,), (3, 2, 3, 3)], 4)
    params = leaves(start)
    opt = trust_region(params, lr=0.3, norm="global_l2")
    for row in grads:
        before = torch.cat([p.detach().flatten().clone() for p in params])
        after = torch.cat([p.flatten() for p in play(opt, params, [row])])
        assert float((after - before).norm()) == pytest.approx(0.3, rel=1e-12)


@pytest.mark.parametrize("norm", norms.NORMS)
def test_every_step_has_exactly_the_length_lr_in_its_norm_unless_the_gradient_is_zero(norm: str) -> None:
    (start,), grads = draw([(9, 6)], 6)
    params = leaves([start])
    opt = trust_region(params, lr=0.3, norm=norm, method="svd")
    before = start
    for row in grads:
        (after,) = play(opt, params, [row])
        assert float(norms.value(after - before, norm)) == pytest.approx(0.3, rel=1e-10)
        before = after
    still = leaves([start])
    opt = trust_region(still, lr=0.3, norm=norm, method="svd")
    assert same(play(opt, still, [[torch.zeros_like(start)]] * 3), [start])


@pytest.mark.parametrize("far", [0.1, 3.0])
@pytest.mark.parametrize("norm", norms.NORMS)
def test_with_decay_the_weights_stay_in_the_larger_of_two_balls(norm: str, far: float) -> None:
    """That of radius lr / b = 1 / weight_decay, and that in which they began; and a steady pull reaches the edge."""
    (start,), grads = draw([(9, 6)], 1)
    g = grads[0][0]
    assert g is not None
    params = leaves([far * start / norms.value(start, norm)])
    opt = trust_region(params, lr=0.05, weight_decay=1.0, norm=norm, method="svd")
    sizes = [float(norms.value(play(opt, params, [[g]])[0], norm)) for _ in range(150)]
    assert max(sizes) <= max(far, 1.0) * (1 + 1e-12)
    assert sizes[-1] == pytest.approx(1.0, rel=0.01)


def regression(lmo_first: bool, seed: int, noise: float = 8.0, steps: int = 400) -> float:
    """The lowest ||W - T||^2 / 2 of three rates at the end of a linear decay, from gradients of much noise."""
    rates = (0.3, 0.1, 0.03)
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(16, 16, generator=generator, dtype=torch.float64)
    params = leaves([torch.zeros(16, 16, dtype=torch.float64)] * 3)
    groups = [{"params": [p], "lr": lr} for p, lr in zip(params, rates, strict=True)]
    opt = trust_region(groups, momentum=0.95, method="svd", lmo_first=lmo_first)
    for t in range(steps):
        for group, lr in zip(opt.param_groups, rates, strict=True):
            group["lr"] = lr * (1 - t / steps)
        error = noise * torch.randn(16, 16, generator=generator, dtype=torch.float64)
        play(opt, params, [[p.detach() - target + error for p in params]])
    return min(float((p.detach() - target).square().sum() / 2) for p in params)


def test_under_noise_averaging_before_the_oracle_ends_lower_than_averaging_after_it() -> None:
    before, after = regression(False, 0), regression(True, 0)
    assert before < 0.8 * after, (before, after)


def test_the_extrapolated_average_of_a_quadratic_is_its_gradient_at_the_iterate() -> None:
    """A linear gradient is carried exactly: m_k = grad f(z_k), so it is the method without momentum, whatever momentum is."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    A, target = root @ root.T, torch.randn(6, 4, generator=generator, dtype=torch.float64)
    start = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    carried, plain = leaves([start]), leaves([start])
    hyper: dict[str, Any] = dict(lr=0.05, method="svd", weight_decay=0.3)
    opt, twin = trust_region(carried, momentum=0.9, extrapolate=True, **hyper), trust_region(plain, momentum=0.0, **hyper)
    for _ in range(25):
        play(opt, carried, [[A @ (carried[0].detach() - target)]])
        play(twin, plain, [[A @ (plain[0].detach() - target)]])
    assert distance([opt.state[carried[0]]["iterate"]], plain) < 1e-9
    assert distance(carried, plain) > 0.1  # the weights are where the next gradient is taken


def test_a_model_s_matrices_get_one_norm_and_its_other_weights_the_other() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(30, 16), torch.nn.Linear(16, 24), torch.nn.ReLU(), torch.nn.Linear(24, 30))
    before = [p.detach().clone() for p in model.parameters()]
    opt = trust_region(model, lr=0.5, method="svd", rest_lr=0.25)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    opt.step()
    moved = [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]
    assert torch.linalg.svdvals(moved[1]).sub(0.5).abs().max() < 1e-4
    for other in (0, 2, 3, 4):
        assert torch.allclose(moved[other].abs(), torch.full_like(moved[other], 0.25), atol=1e-5)


@pytest.mark.parametrize(
    "name, value",
    [
        ("lr", -1e-3),
        ("momentum", 1.0),
        ("weight_decay", -0.1),
        ("norm", "l3"),
        ("method", "newton"),
        ("steps", 0),
        ("start", "ones"),
        ("rest_norm", "spectral"),
        ("rest_norm", "l3"),
        ("rest_lr", -1.0),
        ("rest_weight_decay", -1.0),
    ],
)
def test_an_impossible_setting_is_refused_by_name(name: str, value: Any) -> None:
    hyper: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match="norm" if name == "rest_norm" else name):
        trust_region(leaves(draw([(4, 4)], 0)[0] + draw([(4,)], 0)[0]), **hyper)


def test_extrapolation_decays_in_its_own_way_only() -> None:
    with pytest.raises(ValueError, match="decay='after'"):
        trust_region(leaves(draw([(4, 4)], 0)[0]), extrapolate=True, decay="after")
