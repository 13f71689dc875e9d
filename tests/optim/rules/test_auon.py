"""AuON and Hybrid-AuON (AuON: A Linear-time Alternative to Semi-Orthogonal Momentum Updates, arXiv 2509.24320)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from conformance.problems import Grads, distance, draw, leaves, play, same
from optim.references import adamw, polar
from torch import Tensor

from poise.optim import AuON, HybridAuON
from poise.optim.rules.auon import Variant

auon, hybrid = partial(AuON, backend="eager"), partial(HybridAuON, backend="eager")

CASES: list[dict[str, Any]] = [
    {},
    {"variant": "raw", "weight_decay": 0.1, "adamw_weight_decay": 0.3},
    {"gamma": 3.0, "momentum": 0.5, "adamw_lr": 1e-2, "adamw_betas": (0.9, 0.9), "adamw_eps": 1e-3},
]
CASES_hybrid_auon: list[dict[str, Any]] = [*CASES, {"steps": 1, "variant": "raw"}, {"method": "svd"}]


def braked(
    orthogonal: bool,
    params: Sequence[Tensor],
    grads: Grads,
    *,
    lr: float | Sequence[float],
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    method: str = "ns5",
    steps: int | None = None,
    variant: str = "unit",
    gamma: float | None = None,
    adamw_lr: float = 0.008,
    adamw_betas: tuple[float, float] = (0.8, 0.95),
    adamw_eps: float = 1e-10,
    adamw_weight_decay: float = 0.0,
) -> list[Tensor]:
    """Matrices and convolutions entry by entry, the rest by AdamW, whose learning rate follows the same schedule."""
    rates = list(lr) if isinstance(lr, Sequence) else [lr] * len(grads)
    gamma = gamma if gamma is not None else {"unit": 1.0, "raw": 1.5}[variant]
    ends = []
    for i, start in enumerate(params):
        gradients = [row[i] for row in grads]
        if start.ndim < 2:
            others = [adamw_lr * rate / rates[0] for rate in rates]
            ends.append(adamw(start, gradients, others, adamw_betas, adamw_eps, adamw_weight_decay))
            continue
        w = start.double().reshape(len(start), -1).clone()
        rows, columns = w.shape
        buffer = torch.zeros_like(w)
        for rate, gradient in zip(rates, gradients, strict=True):
            if gradient is None:
                continue
            g = gradient.double().reshape(w.shape)
            buffer = momentum * buffer + (1 - momentum) * g
            m = (1 - momentum) * g + momentum * buffer
            if orthogonal:
                m = polar(m, method, steps)
            length = math.sqrt(sum(e * e for e in m.flatten().tolist())) + 1e-7
            r = math.sqrt(sum(math.cosh(gamma * e / length) ** 2 for e in m.flatten().tolist()) / (rows * columns))
            step = m / (r + 1e-8) if variant == "raw" else math.sqrt(max(1, rows / columns)) * m / length / (r + 1e-8)
            w = (1 - rate * weight_decay) * w - rate * step
        ends.append(w.reshape(start.shape))
    return ends


reference = partial(braked, False)
reference_hybrid_auon = partial(braked, True)


def update(make: Callable[..., Any], gradient: Tensor, **hyper: Any) -> Tensor:
    """What a step without memory adds to a zero weight at lr 1, negated."""
    params = leaves([torch.zeros_like(gradient)])
    return -play(make(params, lr=1.0, **{"momentum": 0.0, **hyper}), params, [[gradient]])[0]


def matrix(*shape: int) -> Tensor:
    return draw([shape], 0)[0][0]


@pytest.mark.parametrize("hyper", CASES, ids=["unit", "raw", "gamma"])
def test_six_steps_of_auon_equal_the_formula(hyper: dict[str, Any]) -> None:
    start, grads = draw([(24, 20), (20, 24), (24,), (8, 4, 3, 3), ()], 6)
    params = leaves(start)
    assert distance(play(auon(params, lr=0.2, **hyper), params, grads), reference(start, grads, lr=0.2, **hyper)) < 1e-13


@pytest.mark.parametrize("hyper", CASES_hybrid_auon, ids=["unit", "raw", "gamma", "one step", "svd"])
def test_six_steps_of_the_hybrid_equal_the_formula(hyper: dict[str, Any]) -> None:
    start, grads = draw([(24, 20), (20, 24), (24,), (8, 4, 3, 3), ()], 6)
    params = leaves(start)
    found = play(hybrid(params, lr=0.2, **hyper), params, grads)
    assert distance(found, reference_hybrid_auon(start, grads, lr=0.2, **hyper)) < 1e-9


@pytest.mark.parametrize("gamma", [0.5, 1.5, 4.0])
@pytest.mark.parametrize("make", [auon, hybrid], ids=["auon", "hybrid"])
def test_the_divisor_is_the_rms_of_a_hyperbolic_cosine(make: Any, gamma: float) -> None:
    """R^2 = (1 + mean cosh(2 gamma u)) / 2, and so at least 1."""
    gradient = matrix(6, 4)
    m = polar(gradient, "svd", None) if make is hybrid else gradient
    extra: dict[str, Any] = {"method": "svd"} if make is hybrid else {}
    divisor = m / update(make, gradient, variant="raw", gamma=gamma, **extra)
    unit = m / (m.norm() + 1e-7)
    wanted = (0.5 * (1 + torch.cosh(2 * gamma * unit).mean())).sqrt() + 1e-8
    assert distance([divisor], [wanted.expand(6, 4)]) < 1e-11
    assert float(divisor.min()) >= 1


@pytest.mark.parametrize("side, excess", [(8, 1.8e-2), (64, 2.7e-4), (256, 1.7e-5)])
def test_the_divisor_exceeds_one_by_what_the_size_of_the_matrix_says(side: int, excess: float) -> None:
    """gamma^2 / (2 N) of N entries, to leading order."""
    gradient = matrix(side, side)
    found = float((gradient / update(auon, gradient, variant="raw")).mean()) - 1
    assert found == pytest.approx(1.5**2 / (2 * side**2), rel=0.03)
    assert found == pytest.approx(excess, rel=0.05)


@pytest.mark.parametrize("variant, gamma", [("unit", 1.0), ("raw", 1.5)])
def test_it_is_sgd_within_the_size_of_the_divisors_effect(variant: Variant, gamma: float) -> None:
    """`unit` is normalized, `raw` plain Nesterov momentum; a larger difference, or none, is another method."""
    start, grads = draw([(64, 64)], 10)
    params = leaves(start)
    found = play(auon(params, lr=0.1, variant=variant), params, grads)[0] - start[0]
    moved, buffer = torch.zeros(64, 64, dtype=torch.float64), torch.zeros(64, 64, dtype=torch.float64)
    for (g,) in grads:
        assert g is not None
        buffer = 0.95 * buffer + 0.05 * g
        m = 0.05 * g + 0.95 * buffer
        moved -= 0.1 * (m / m.norm() if variant == "unit" else m)
    gap = float((found - moved).norm() / moved.norm())
    assert gap == pytest.approx(gamma**2 / (2 * 64**2), rel=0.05)


@pytest.mark.parametrize("make", [auon, hybrid], ids=["auon", "hybrid"])
@pytest.mark.parametrize("shape, longest", [((32, 32), 1.0), ((16, 64), 1.0), ((64, 16), 2.0)])
def test_a_step_of_unit_is_never_longer_than_lr_times_its_shapes_factor(
    make: Any, shape: tuple[int, int], longest: float
) -> None:
    for scale in (1e-3, 1.0, 1e6):
        length = float(update(make, scale * matrix(*shape)).norm())
        assert 0.999 * longest < length <= longest


@pytest.mark.parametrize("variant", ["unit", "raw"])
def test_the_hybrid_with_an_exact_polar_factor_has_equal_singular_values(variant: str) -> None:
    values = torch.linalg.svdvals(update(hybrid, matrix(24, 40), method="svd", variant=variant))
    assert float((values - values[0]).abs().max()) < 1e-13
    wanted = 1.0 if variant == "raw" else 1 / math.sqrt(24)
    assert float(values[0]) == pytest.approx(wanted, rel=2e-3)


def test_a_single_newton_schulz_step_of_the_paper_is_there() -> None:
    a, b, c = 3.4445, -4.7750, 2.0315
    gradient = matrix(12, 20)
    left, values, right = torch.linalg.svd(gradient / gradient.norm(), full_matrices=False)
    wanted = left @ torch.diag(a * values + b * values**3 + c * values**5) @ right
    assert distance([update(hybrid, gradient, variant="raw", gamma=0.0, steps=1)], [wanted]) < 1e-7


def test_without_its_cosine_unit_is_normalized_momentum() -> None:
    gradient = matrix(20, 20)
    assert distance([update(auon, gradient, gamma=0.0)], [gradient / (gradient.norm() + 1e-7) / (1 + 1e-8)]) < 1e-15


def test_zero_gradients_only_decay_the_weights() -> None:
    start, _ = draw([(12, 8)], 0)
    for make in (auon, hybrid):
        params = leaves(start)
        zeros: Grads = [[torch.zeros_like(start[0])]] * 5
        assert distance(play(make(params, lr=0.1, weight_decay=0.5), params, zeros), [start[0] * 0.95**5]) < 1e-14


@pytest.mark.parametrize("make", [auon, hybrid], ids=["auon", "hybrid"])
def test_parts_of_a_fused_projection_are_matrices_of_their_own(make: Any) -> None:
    (start,), grads = draw([(48, 16)], 4)
    fused, apart = leaves([start]), leaves(start.chunk(3))
    found = play(make([("attn.qkv.weight", fused[0])], lr=0.1), fused, grads)[0]
    rows: Grads = [list(g.chunk(3)) for row in grads for g in row if g is not None]
    assert distance(found.chunk(3), play(make(apart, lr=0.1), apart, rows)) < 1e-13


def test_the_gradient_is_never_written_to() -> None:
    start, grads = draw([(12, 8), (8,)], 3)
    params = leaves(start)
    opt = auon(params)
    for row in grads:
        play(opt, params, [row])
        assert same([p.grad for p in params if p.grad is not None], [g for g in row if g is not None])


@pytest.mark.parametrize("make, variant", [(auon, "unit"), (hybrid, "unit"), (hybrid, "raw")])
def test_one_rms_for_all_rules_knows_how_large_its_updates_are(make: Any, variant: str) -> None:
    (start,), grads = draw([(48, 12)], 1)
    params = leaves([start])
    extra: dict[str, Any] = {"method": "svd"} if make is hybrid else {}
    moved = play(make(params, lr=0.1, variant=variant, scale="rms", **extra), params, grads)[0] - start
    assert float(moved.square().mean().sqrt()) == pytest.approx(0.02, rel=5e-3)


@pytest.mark.parametrize(
    "name, value",
    [
        ("lr", -0.1),
        ("momentum", 1.5),
        ("weight_decay", -0.1),
        ("variant", "both"),
        ("gamma", -1.0),
        ("gamma", math.inf),
        ("adamw_lr", -1.0),
    ],
)
def test_an_impossible_setting_is_refused_by_name(name: str, value: Any) -> None:
    hyper: dict[str, Any] = {name: value}
    for make in (auon, hybrid):
        with pytest.raises(ValueError, match=name):
            make(leaves(draw([(4, 4)], 0)[0]), **hyper)
