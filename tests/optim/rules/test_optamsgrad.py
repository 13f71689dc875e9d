"""OPT-AMSGrad (An Optimistic Acceleration of AMSGrad for Nonconvex Optimization, arXiv 1903.01435)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from conformance.problems import Grads, distance, draw, leaves, play
from torch import Tensor

from poise.optim import OptAMSGrad

opt_amsgrad = partial(OptAMSGrad, backend="eager")

CASES: list[dict[str, Any]] = [
    {},
    {"history": 2, "ridge": 0.1, "weight_decay": 0.1},
    {"history": 2, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.1, "variance": "gradient"},
    {"predictor": "last"},
    {"predictor": "none", "weight_decay": 0.1},
]
# An error of prediction vanishes where gradients are all the same, and steps grow thirtyfold: such a rule has no pace.
TYPICAL: dict[str, Any] = {"variance": "gradient", "betas": (0.9, 0.95)}


def reference(
    params: Sequence[Tensor],
    grads: Grads,
    *,
    lr: float | Sequence[float],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    predictor: str = "extrapolation",
    history: int = 5,
    ridge: float = 1e-3,
    variance: str = "error",
    oracle: Sequence[Sequence[Tensor]] = (),
) -> list[Tensor]:
    """Two iterates for each tensor, z and the weights ahead of it."""
    rates = list(lr) if isinstance(lr, Sequence) else [lr] * len(grads)
    b1, b2 = betas
    w = [p.double().clone() for p in params]
    z = [p.clone() for p in w]
    m, v, largest, p = ([torch.zeros_like(x) for x in w] for _ in range(4))
    past: list[list[Tensor]] = [[] for _ in w]
    for number, (rate, row) in enumerate(zip(rates, grads, strict=True)):
        present = {i: g.double() for i, g in enumerate(row) if g is not None}
        for i, g in present.items():
            past[i] = [*past[i], g][-history - 1 :]
        ready = [i for i in present if len(past[i]) == history + 1]
        joined = [torch.cat([past[i][j].reshape(-1) for i in ready]) for j in range(history + 1)] if ready else []
        weights = extrapolation(joined, ridge) if ready else []
        for i, g in present.items():
            before = m[i]
            full = g + weight_decay * w[i]
            m[i] = b1 * m[i] + (1 - b1) * full
            v[i] = b2 * v[i] + (1 - b2) * (full - p[i] if variance == "error" else full) ** 2
            largest[i] = torch.maximum(largest[i], v[i])
            rate_here = rate / (torch.sqrt(largest[i]) + eps)
            z[i] = z[i] - rate_here * m[i]
            if predictor == "none":
                w[i] = z[i]
                continue
            p[i] = g
            if predictor == "fed":
                p[i] = oracle[number][i]
            elif predictor == "extrapolation" and i in ready:
                p[i] = sum((c * x for c, x in zip(weights, past[i][:-1], strict=True)), torch.zeros_like(g))
            w[i] = z[i] - rate_here * (b1 * before + (1 - b1) * p[i])
    return w


def extrapolation(x: list[Tensor], ridge: float) -> list[float]:
    """Weights of x_0, ..., x_{r-1}."""
    U = torch.stack([b - a for a, b in itertools.pairwise(x)], dim=1)
    G = U.T @ U
    G = G + ridge * torch.linalg.matrix_norm(G, 2) * torch.eye(len(x) - 1, dtype=torch.float64)
    c = torch.linalg.inv(G) @ torch.ones(len(x) - 1, dtype=torch.float64)
    return (c / c.sum()).tolist()


@pytest.mark.parametrize("hyper", CASES, ids=["defaults", "short", "others", "last", "none"])
def test_forty_steps_equal_the_formula(hyper: dict[str, Any]) -> None:
    start, grads = draw([(16, 8), (16,)], 40, missing=[(3, 0), (7, 1)])
    params = leaves(start)
    found = play(opt_amsgrad(params, lr=0.01, **hyper), params, grads)
    assert distance(found, reference(start, grads, lr=0.01, **hyper)) < 1e-10


def test_with_predictions_from_outside_it_equals_the_formula() -> None:
    start, grads = draw([(16, 8), (16,)], 12)
    _, given = draw([(16, 8), (16,)], 12, seed=5)
    oracle = [[g for g in row if g is not None] for row in given]
    params = leaves(start)
    opt = opt_amsgrad(params, lr=0.01, predictor="fed")
    with pytest.raises(RuntimeError, match="prediction"):
        play(opt, params, grads[:1])
    for row, predicted in zip(grads, oracle, strict=True):
        opt.feed(prediction=predicted)
        play(opt, params, [row])
    assert distance(params, reference(start, grads, lr=0.01, predictor="fed", oracle=oracle)) < 1e-12


def test_without_predictions_it_is_amsgrad_without_bias_correction() -> None:
    start, grads = draw([(16, 8)], 30)
    params = leaves(start)
    found = play(opt_amsgrad(params, lr=0.01, betas=(0.8, 0.9), predictor="none"), params, grads)
    x, m, v, largest = start[0], *(torch.zeros_like(start[0]) for _ in range(3))
    for (g,) in grads:
        assert g is not None
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        largest = torch.maximum(largest, v)
        x = x - 0.01 * m / (largest.sqrt() + 1e-8)
    assert distance(found, [x]) < 1e-14


def test_gradients_on_their_way_to_a_limit_are_predicted_at_it() -> None:
    """g_t = a + b 0.7^t + c (-0.5)^t: after six of them the prediction is a, where the last gradient is still 0.13 from it."""
    a, b, c = draw([(16,), (16,), (16,)], 0)[0]
    params = leaves([torch.zeros(16, dtype=torch.float64)])
    opt = opt_amsgrad(params, ridge=1e-13)
    rows: Grads = [[a + b * 0.7**t + c * (-0.5) ** t] for t in range(6)]
    play(opt, params, rows[:5])
    assert rows[4][0] is not None
    assert torch.equal(opt.state[params[0]]["prediction"], rows[4][0])  # too few yet
    play(opt, params, rows[5:])
    assert (opt.state[params[0]]["prediction"] - a).abs().max() < 1e-4


def test_the_weights_are_moved_outside_and_the_iterate_goes_with_them() -> None:
    """What is kept is the distance to it: loading other weights does not bring the old ones back."""
    start, grads = draw([(16, 8)], 8)
    params, twin = leaves(start), leaves(start)
    opt, other = opt_amsgrad(params, lr=0.01), opt_amsgrad(twin, lr=0.01)
    play(opt, params, grads[:4])
    play(other, twin, grads[:4])
    params[0].data.add_(5.0)
    play(opt, params, grads[4:])
    play(other, twin, grads[4:])
    assert distance(params, [twin[0] + 5.0]) < 1e-13


def regret(predictor: Any) -> float:
    """Of 400 linear losses <g_t, x>, g_t turning by 0.01 in each step, against the best point of the unit disc."""
    params = leaves([torch.zeros(2, dtype=torch.float64)])
    opt = opt_amsgrad(params, lr=0.05, betas=(0.0, 0.99), predictor=predictor, variance="gradient")
    slopes = [torch.tensor([math.cos(0.01 * t), math.sin(0.01 * t)], dtype=torch.float64) for t in range(401)]
    total = 0.0
    for g, following in itertools.pairwise(slopes):
        total += float(g @ params[0].detach())
        if predictor == "fed":
            opt.feed(prediction=[following])
        play(opt, params, [[g]])
    best = -float(torch.stack(slopes[:-1]).sum(0).norm())
    return total - best


def test_an_oracle_lowers_the_regret_on_slowly_turning_losses() -> None:
    assert regret("fed") < regret("none") - 0.5
    assert regret("last") < regret("none") - 0.5
    assert regret("fed") < regret("last")


@pytest.mark.parametrize(
    "name, value",
    [
        ("lr", -0.1),
        ("betas", (1.0, 0.9)),
        ("eps", -1.0),
        ("weight_decay", -0.1),
        ("predictor", "next"),
        ("history", 0),
        ("ridge", 0.0),
        ("variance", "none"),
    ],
)
def test_an_impossible_setting_is_refused_by_name(name: str, value: Any) -> None:
    hyper: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=name):
        opt_amsgrad(leaves(draw([(4, 4)], 0)[0]), **hyper)
