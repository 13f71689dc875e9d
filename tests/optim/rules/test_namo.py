"""NAMO and NAMO-D (Adam Improves Muon: Adaptive Moment Estimation with Orthogonalized Momentum, arXiv 2602.17080)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from conformance.problems import Grads, distance, draw, leaves, play, same
from optim.references import adamw, polar, shape_factor
from torch import Tensor

from poise.optim import NAMO, NAMOD, Muon

namo, namo_d = partial(NAMO, backend="eager"), partial(NAMOD, backend="eager")
plain = partial(namo, method="svd", scale_rule="none", weight_decay=0.0, eps=0.0)  # what it adds has spectral norm alpha
plain_d = partial(namo_d, method="svd", scale_rule="none", weight_decay=0.0, eps=0.0)

CASES: list[dict[str, Any]] = [
    {},
    {"nesterov": False, "mu2": 0.9, "weight_decay": 0.5, "scale_rule": "none", "cap": False},
    {"method": "svd", "eps": 0.1, "adamw_lr": 1e-3, "adamw_weight_decay": 0.3, "momentum": 0.5, "scale_rule": "original"},
]
CASES_namo_d: list[dict[str, Any]] = [*CASES, {"clamp": 0.9, "nesterov": False}, {"clamp": 0.0}]


def adapted(
    columns: bool,
    params: Sequence[Tensor],
    grads: Grads,
    *,
    lr: float | Sequence[float],
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    mu2: float = 0.99,
    eps: float = 1e-8,
    clamp: float = 0.75,
    nesterov: bool = True,
    method: str = "polar_express",
    steps: int | None = None,
    scale_rule: str = "match_rms",
    cap: bool = True,
    adamw_lr: float | None = None,
    adamw_betas: tuple[float, float] = (0.9, 0.95),
    adamw_eps: float = 1e-8,
    adamw_weight_decay: float | None = None,
) -> list[Tensor]:
    """Matrices and convolutions column after column (NAMO: all columns as one), the rest by AdamW."""
    rates = list(lr) if isinstance(lr, Sequence) else [lr] * len(grads)
    largest = 1.0 if cap else math.inf
    ends = []
    for i, start in enumerate(params):
        gradients = [row[i] for row in grads]
        if start.ndim < 2:
            others = rates if adamw_lr is None else [adamw_lr * rate / rates[0] for rate in rates]
            decay = weight_decay if adamw_weight_decay is None else adamw_weight_decay
            ends.append(adamw(start, gradients, others, adamw_betas, adamw_eps, decay))
            continue
        w = start.double().reshape(len(start), -1).clone()
        buffer = torch.zeros_like(w)
        parts = [slice(j, j + 1) for j in range(w.shape[1])] if columns else [slice(None)]
        v, t = [0.0] * len(parts), 0
        for rate, gradient in zip(rates, gradients, strict=True):
            if gradient is None:
                continue
            g = gradient.double().reshape(w.shape)
            t += 1
            buffer = momentum * buffer + (1 - momentum) * g
            m = (1 - momentum) * g + momentum * buffer if nesterov else buffer
            o = polar(m, method, steps)
            d = []
            for j, part in enumerate(parts):
                v[j] = mu2 * v[j] + (1 - mu2) * float(g[:, part].norm()) ** 2
                d.append(float(m[:, part].norm()) / (math.sqrt(v[j]) + eps))
            if columns and clamp > 0:
                mean = sum(d) / len(d)
                d = [min(max(one, clamp * mean), mean / clamp) for one in d]
            for one, part in zip(d, parts, strict=True):
                alpha = rate * math.sqrt(1 - mu2**t) / (1 - momentum**t) * one
                step = alpha * shape_factor(w.shape[0], w.shape[1], scale_rule)
                w[:, part] = (1 - weight_decay * min(alpha, largest)) * w[:, part] - min(step, largest) * o[:, part]
        ends.append(w.reshape(start.shape))
    return ends


reference = partial(adapted, False)
reference_namo_d = partial(adapted, True)


def alphas(make: Any, grads: Sequence[Tensor], lr: float = 1e-3) -> list[float]:
    """alpha / lr of each step, read off what one matrix moves by."""
    params = leaves([torch.zeros_like(grads[0])])
    opt = make(params, lr=lr)
    found, before = [], params[0].detach().clone()
    for gradient in grads:
        (after,) = play(opt, params, [[gradient]])
        found.append(float(torch.linalg.matrix_norm(after - before, 2)) / lr)
        before = after
    return found


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return draw([shape], 0, seed=seed)[0][0]


def noise(steps: int, *shape: int) -> list[Tensor]:
    return [g for row in draw([shape], steps, seed=3)[1] for g in row if g is not None]


@pytest.mark.parametrize("hyper", CASES, ids=["defaults", "paper", "svd"])
def test_ten_steps_of_namo_equal_the_formula(hyper: dict[str, Any]) -> None:
    start, grads = draw([(24, 40), (40, 24), (24,), (8, 4, 3, 3), ()], 10)
    params = leaves(start)
    assert distance(play(namo(params, lr=0.02, **hyper), params, grads), reference(start, grads, lr=0.02, **hyper)) < 1e-10


@pytest.mark.parametrize("hyper", CASES_namo_d, ids=["defaults", "paper", "svd", "clamped", "free"])
def test_ten_steps_of_namo_d_equal_the_formula(hyper: dict[str, Any]) -> None:
    start, grads = draw([(24, 40), (40, 24), (24,), (8, 4, 3, 3), ()], 10)
    params = leaves(start)
    assert (
        distance(play(namo_d(params, lr=0.02, **hyper), params, grads), reference_namo_d(start, grads, lr=0.02, **hyper))
        < 1e-10
    )


@pytest.mark.parametrize("make", [plain, partial(plain_d, clamp=0.0)], ids=["namo", "namo-d"])
def test_without_look_ahead_a_constant_gradient_is_followed_at_lr_from_the_first_step_on(make: Any) -> None:
    found = alphas(partial(make, nesterov=False), [matrix(12, 20)] * 30)
    assert max(abs(alpha - 1) for alpha in found) < 1e-12


@pytest.mark.parametrize("make", [plain, partial(plain_d, clamp=0.0)], ids=["namo", "namo-d"])
@pytest.mark.parametrize("mu", [0.95, 0.5])
def test_the_look_ahead_makes_the_first_step_one_plus_mu_long(make: Any, mu: float) -> None:
    assert abs(alphas(partial(make, momentum=mu), [matrix(12, 20)])[0] - (1 + mu)) < 1e-12


def test_nothing_but_noise_shrinks_the_step_to_a_sixth() -> None:
    """`sqrt((1 - mu) / (1 + mu))` = 0.160 at mu = 0.95."""
    found = alphas(partial(plain, nesterov=False), noise(400, 24, 24))[200:]
    assert abs(sum(found) / len(found) - 0.160) < 0.006


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_namo_keeps_all_singular_values_equal(shape: tuple[int, int]) -> None:
    params = leaves([torch.zeros(shape)], torch.float64)
    opt = plain(params, lr=0.01)
    before = play(opt, params, [[g] for g in noise(5, *shape)])[0]
    moved = play(opt, params, [[matrix(*shape, seed=5)]])[0] - before
    values = torch.linalg.svdvals(moved)
    assert float((values - values[0]).abs().max()) < 1e-14
    assert float(values[0]) > 1e-3


def test_namo_d_clamped_to_one_gives_every_column_the_mean() -> None:
    gradient = matrix(12, 20) * torch.linspace(0.01, 3, 20, dtype=torch.float64)
    later = matrix(12, 20, seed=4)
    params = leaves([torch.zeros(12, 20)], torch.float64)
    opt = plain_d(params, lr=0.01, clamp=1.0, momentum=0.5, mu2=0.8, nesterov=False)
    before = play(opt, params, [[gradient]])[0]
    moved = play(opt, params, [[later]])[0] - before
    momentum = 0.5 * 0.5 * gradient + 0.5 * later
    root = (0.8 * 0.2 * gradient.square().sum(0) + 0.2 * later.square().sum(0)).sqrt()
    mean = (momentum.square().sum(0).sqrt() / root).mean()
    wanted = -0.01 * math.sqrt(1 - 0.8**2) / (1 - 0.5**2) * mean * polar(momentum, "svd", None)
    assert distance([moved], [wanted]) < 1e-14


def test_namo_d_keeps_each_column_within_its_clamp_of_the_mean() -> None:
    """Half of the columns are steady and half are noise; unclamped, their steps lie further apart."""
    steady = torch.cat([torch.ones(1, 10), torch.zeros(1, 10)], dim=1).double()
    pull = matrix(16, 20)
    drawn = [steady * pull + (1 - steady) * g for g in noise(60, 16, 20)]
    grads: Grads = [[g] for g in drawn]
    spreads = {}
    for clamp in (0.0, 0.75):
        params = leaves([torch.zeros(16, 20)], torch.float64)
        opt = plain_d(params, lr=0.01, clamp=clamp, nesterov=False)
        before = play(opt, params, grads[:-1])[0]
        moved = play(opt, params, grads[-1:])[0] - before
        buffer = torch.zeros(16, 20, dtype=torch.float64)
        for g in drawn:
            buffer = 0.95 * buffer + 0.05 * g
        shares = moved.norm(dim=0) / polar(buffer, "svd", None).norm(dim=0)
        spreads[clamp] = float(shares.max() / shares.min())
    assert spreads[0.0] > 3
    assert 1.5 < spreads[0.75] <= 0.75**-2 + 1e-9


def test_the_papers_form_steps_and_decays_by_one_rate() -> None:
    """W <- W - lr a (O + wd W), with the same a that steps without decay are scaled by."""
    (start,), grads = draw([(12, 8)], 1)
    form = partial(namo, method="svd", cap=False, scale_rule="none", lr=0.3)
    moved, decayed = (play(form(p, weight_decay=wd), p, grads)[0] for wd in (0.0, 0.5) for p in [leaves([start])])
    a = torch.linalg.matrix_norm(moved - start, 2)
    assert float(a) == pytest.approx(0.3 * 1.95, abs=1e-6)
    assert distance([decayed - moved], [-0.5 * a * start]) < 1e-13


@pytest.mark.parametrize("make", [namo, namo_d], ids=["namo", "namo-d"])
def test_no_rate_moves_a_weight_by_more_than_an_orthogonal_matrix_or_decays_it_past_zero(make: Any) -> None:
    (start,), grads = draw([(12, 8)], 1)
    params = leaves([start])
    (found,) = play(make(params, lr=100.0, weight_decay=1.0, method="svd"), params, grads)
    assert float((torch.linalg.svdvals(found) - 1).abs().max()) < 1e-12
    params = leaves([start])
    (free,) = play(make(params, lr=100.0, weight_decay=1.0, method="svd", cap=False), params, grads)
    assert float(torch.linalg.matrix_norm(free, 2)) > 100


@pytest.mark.parametrize("make", [plain, plain_d], ids=["namo", "namo-d"])
@pytest.mark.parametrize("exponent", [-30, 14])
def test_the_scale_of_the_gradients_makes_no_difference(make: Any, exponent: int) -> None:
    start, grads = draw([(12, 20)], 8)
    scaled: Grads = [[g * 2.0**exponent for g in row if g is not None] for row in grads]
    ends = []
    for rows in (grads, scaled):
        params = leaves(start)
        ends.append(play(make(params, lr=0.02), params, rows))
    assert distance(*ends) < 1e-13


@pytest.mark.parametrize("make", [namo, namo_d], ids=["namo", "namo-d"])
@pytest.mark.parametrize("name, shape", [("attn.qkv.weight", (48, 16)), ("mlp.experts.w1", (3, 16, 10))])
def test_parts_of_a_fused_projection_and_stacked_experts_are_matrices_of_their_own(
    make: Any, name: str, shape: tuple[int, ...]
) -> None:
    start, grads = draw([shape], 5)
    grown = [[g * torch.tensor([0.1, 1.0, 5.0]).repeat_interleave(shape[0] // 3).reshape(-1, *[1] * (len(shape) - 1))]
             for row in grads for g in row if g is not None]  # fmt: skip
    split = [t.chunk(3) for t in start]
    apart = leaves([part.reshape(part.shape[-2:]) for part in split[0]])
    fused = leaves(start)
    found = play(make([(name, fused[0])], lr=0.02), fused, [list(row) for row in grown])[0]
    rows: Grads = [[part.reshape(part.shape[-2:]) for part in row[0].chunk(3)] for row in grown]
    wanted = play(make(apart, lr=0.02), apart, rows)
    assert distance([part.reshape(part.shape[-2:]) for part in found.chunk(3)], wanted) < 1e-12


@pytest.mark.parametrize("make, numbers", [(namo, 1), (namo_d, 5000)], ids=["namo", "namo-d"])
def test_the_norms_stay_in_float32_whatever_the_state_is_kept_in(make: Any, numbers: int) -> None:
    params = leaves([torch.zeros(2, 5000, dtype=torch.bfloat16)])
    norms = make(params, state="int4").state[params[0]]["norm_sq"]
    assert norms.dtype is torch.float32
    assert norms.numel() == numbers


def test_a_constant_gradient_makes_namo_muon() -> None:
    """Without look-ahead alpha is lr, so that nothing of NAMO is left."""
    start, grads = draw([(24, 40)], 1)
    a, b = leaves(start), leaves(start)
    found = play(namo(a, lr=0.02, nesterov=False, eps=0.0), a, grads * 8)
    wanted = play(Muon(b, 0.02, nesterov=False, weight_decay=0.1, scale_rule="match_rms", backend="eager"), b, grads * 8)
    assert distance(found, wanted) < 1e-12


def test_a_zero_gradient_moves_nothing_and_gives_no_nan() -> None:
    for make in (namo, namo_d):
        params = leaves([torch.ones(6, 4)])
        assert same(play(make(params, lr=0.1, weight_decay=0.5), params, [[torch.zeros(6, 4)]] * 3), [torch.ones(6, 4)])


def test_vectors_follow_adamw_at_the_same_rate_and_decay() -> None:
    start, grads = draw([(24,), (24, 40)], 12)
    ours, theirs = leaves(start), leaves(start)
    found = play(namo(ours, lr=0.02), ours, grads)
    wanted = play(torch.optim.AdamW(theirs, lr=0.02, betas=(0.9, 0.95), weight_decay=0.1), theirs, grads)
    assert distance(found[:1], wanted[:1]) < 1e-12


@pytest.mark.parametrize(
    "name, value",
    [
        ("lr", -0.1),
        ("weight_decay", -0.1),
        ("momentum", 1.5),
        ("mu2", 1.0),
        ("eps", -1.0),
        ("clamp", 1.5),
        ("method", "newton"),
        ("scale_rule", "huge"),
        ("adamw_lr", -1.0),
        ("adamw_weight_decay", -1.0),
    ],
)
def test_an_impossible_setting_is_refused_by_name(name: str, value: Any) -> None:
    hyper: dict[str, Any] = {name: value}
    for make in (namo_d,) if name == "clamp" else (namo, namo_d):
        with pytest.raises(ValueError, match=name):
            make(leaves(draw([(4, 4)], 0)[0]), **hyper)
