"""Implicit MAP filtering (Implicit Maximum a Posteriori Filtering via Adaptive Optimization, arXiv 2311.10580)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conformance.cases import build as build_rule
from conformance.problems import distance, same
from torch import Tensor, nn
from training.cases import Bowl, bowl_task, classify, play, trained

from poise.catalog import Method
from poise.linalg.kalman import step_matrix
from poise.optim import SGD, AdamW
from poise.training import EMA, SAM, ImplicitMAP


def shrink(weights: list[Tensor], t: int) -> list[Tensor]:
    """Dynamics that differ from step to step."""
    return [(0.9 - 0.02 * t) * w for w in weights]


CASES: list[dict[str, Any]] = [{"steps": 1}, {"steps": 4}, {"steps": 2, "predict": shrink}]
NEUTRAL: dict[str, Any] = {"steps": 1, "fresh": False}
TYPICAL: dict[str, Any] = {"steps": 2}
INNER_STEPS = 2

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "poise AdamW": lambda model: AdamW(model, lr=0.01, backend="eager"),
    "Adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.01),
    "Adam, AMSGrad": lambda model: torch.optim.Adam(model.parameters(), lr=0.01, amsgrad=True),
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
    "RMSprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=0.01),
    "Adagrad": lambda model: torch.optim.Adagrad(model.parameters(), lr=0.01, initial_accumulator_value=0.3),
    "Adadelta": lambda model: torch.optim.Adadelta(model.parameters()),
}


def reference(
    bowl: Bowl, *, lr: float, steps: int, steps_: int, predict: Callable[[list[Tensor], int], list[Tensor]] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """One batch is one observation: predict, then descend K times on it alone."""
    x = bowl.start()
    for t in range(steps):
        if predict is not None:
            x = predict(x, t)
        for _ in range(steps_):
            x = [a - lr * b for a, b in zip(x, bowl.gradient(x, t), strict=True)]
    return x, x


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_two_identical_observations_from_the_same_weights_give_identical_updates(
    make: Callable[[nn.Module], torch.optim.Optimizer],
) -> None:
    task = classify()
    start = trained(task)
    opt = ImplicitMAP(make(task.model), steps=3)
    first = play(opt, task, 1)
    for p, value in zip(task.model.parameters(), start, strict=True):
        p.data.copy_(value)
    assert same(play(opt, task, 1), first)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_each_observation_is_seen_by_an_optimizer_that_was_never_used(
    make: Callable[[nn.Module], torch.optim.Optimizer],
) -> None:
    task, twin = classify(), classify()
    opt = ImplicitMAP(make(task.model), steps=3)
    for t in range(4):
        used = make(twin.model)
        for _ in range(3):
            play(used, twin, 1, t)
        assert same(play(opt, task, 1, t), trained(twin))


def test_every_rule_begins_anew_as_if_it_had_just_been_built(rule: Method) -> None:
    task, twin = classify(), classify()
    used: Any = build_rule(rule, task.model, backend="eager", state="int8")
    before = play(used, task, 3)
    for p, value in zip(twin.model.parameters(), before, strict=True):
        p.data.copy_(value)
    used.begin_anew()
    assert same(trained(task), before)
    fresh = build_rule(rule, twin.model, backend="eager", state="int8")
    for p, q in zip(task.model.parameters(), twin.model.parameters(), strict=True):
        assert used.state[p].keys() == fresh.state[q].keys()
        assert same(list(used.state[p].values()), list(fresh.state[q].values()))
    assert [group["clock"] for group in used.param_groups] == [group["clock"] for group in fresh.param_groups]
    assert same(play(used, task, 3, 3), play(fresh, twin, 3, 3))


def test_the_lower_halves_of_split_weights_are_weights_and_stay() -> None:
    task = classify(dtype=torch.bfloat16)
    inner = AdamW(task.model, lr=0.01, weights="split", backend="eager")
    play(inner, task, 3)
    lows = [inner.state[p]["weight.low"].clone() for p in task.model.parameters()]
    assert any(bool(low.any()) for low in lows)
    inner.begin_anew()
    assert same([inner.state[p]["weight.low"] for p in task.model.parameters()], lows)
    assert all(not inner.state[p]["exp_avg"].any() for p in task.model.parameters())


def test_unless_told_to_forget_momentum_would_run_on() -> None:
    task, twin = classify(), classify()
    runs = [ImplicitMAP(SGD(t.model, lr=0.1, momentum=0.9), steps=2, fresh=fresh) for t, fresh in ((task, True), (twin, False))]
    assert same(play(runs[0], task, 1), play(runs[1], twin, 1))
    assert not same(play(runs[0], task, 1, 1), play(runs[1], twin, 1, 1))


def test_the_prediction_is_made_before_the_steps_and_told_how_many_observations_came_before() -> None:
    task = bowl_task()
    seen: list[tuple[int, list[Tensor]]] = []

    def predict(weights: list[Tensor], t: int) -> list[Tensor]:
        seen.append((t, [w.clone() for w in weights]))
        return [w + 1 for w in weights]

    opt = ImplicitMAP(SGD(task.model, lr=0.0), steps=3, predict=predict)
    start = trained(task)
    play(opt, task, 2)
    assert [t for t, _ in seen] == [0, 1]
    assert same(seen[0][1], start)
    assert distance(trained(task), [w + 2 for w in start]) < 1e-15


def test_the_prediction_sees_and_sets_split_weights_in_full_precision() -> None:
    params = [nn.Parameter(torch.linspace(0.5, 1.5, 64).bfloat16())]
    seen: list[Tensor] = []

    def predict(weights: list[Tensor], t: int) -> list[Tensor]:
        seen.append(weights[0].clone())
        return [weights[0] + 1e-4]

    opt = ImplicitMAP(SGD(params, lr=0.0, weights="split", backend="eager"), steps=2, predict=predict)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = params[0].float().sum()
        loss.backward()
        return loss

    for _ in range(5):
        opt.step(closure)
    assert seen[0].dtype == torch.float32
    assert distance([seen[4]], [seen[0] + 4e-4]) < 1e-6


def test_only_the_newest_observation_is_asked_for_and_k_times() -> None:
    task = classify()
    asked: list[int] = []
    opt = ImplicitMAP(torch.optim.Adam(task.model.parameters()), steps=5)
    plain = task.closure(opt)

    def closure() -> Tensor:
        asked.append(task.at)
        return plain()

    for task.at in range(3):
        opt.step(closure)
    assert asked == [0] * 5 + [1] * 5 + [2] * 5


def drift(K: int, seed: int, *, exact: bool = False) -> float:
    """Mean squared error of a linear regression of 8 weights that wander, on 6 noisy values at a time, over the second half."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    truth, w = normal(8), nn.Parameter(torch.zeros(8, dtype=torch.float64))
    opt = ImplicitMAP(torch.optim.Adam([w], lr=0.01), steps=K)
    errors = []
    for t in range(60):
        truth = truth + 0.05 * normal(8)
        H = normal(6, 8)
        y = H @ truth + 0.3 * normal(6)

        def closure(H: Tensor = H, y: Tensor = y) -> Tensor:
            opt.zero_grad()
            loss = (y - H @ w).square().sum() / (2 * 0.3**2)
            loss.backward()
            return loss

        if exact:
            with torch.no_grad():
                w.add_(torch.linalg.pinv(H) @ (y - H @ w))
        else:
            opt.step(closure)
        if t >= 30:
            errors.append(float((w.detach() - truth).square().sum()))
    return sum(errors) / len(errors)


def test_on_a_drifting_regression_k_steps_beat_one_step_and_a_perfect_fit_of_the_newest_observation() -> None:
    """What minimizes the newest loss, reached as K grows, follows its noise; a single step does not follow the drift."""
    for seed in range(3):
        some = drift(10, seed)
        assert some < 0.5 * drift(1, seed)
        assert some < 0.5 * drift(1, seed, exact=True)
    assert drift(10, 0) < 0.5 * drift(120, 0)


@pytest.mark.parametrize("K", [1, 2, 5, 17])
def test_descent_with_the_kalman_matrix_is_a_kalman_filter_over_many_observations(K: int) -> None:
    """Descent in v with w = L v, M = L L^T, is descent in w with M; the covariance goes its own way."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    F, Q, P = 0.9 * torch.eye(4).double() + 0.1 * normal(4, 4), 0.1 * torch.eye(4).double(), torch.eye(4).double()
    w, v = torch.zeros(4, dtype=torch.float64), nn.Parameter(torch.zeros(4, dtype=torch.float64))
    roots = [torch.eye(4).double()]
    opt = ImplicitMAP(
        SGD([v], lr=1.0, backend="eager"), steps=K,
        predict=lambda some, t: [torch.linalg.solve(roots[-1], F @ roots[-2] @ some[0])],
    )  # fmt: skip
    for _ in range(6):
        H, y = normal(3, 4), normal(3)
        w, P = F @ w, F @ P @ F.T + Q
        roots.append(torch.linalg.cholesky(step_matrix(P, H, steps=K)))

        def closure(H: Tensor = H, y: Tensor = y) -> Tensor:
            opt.zero_grad()
            loss = (y - H @ roots[-1] @ v).square().sum() / 2
            loss.backward()
            return loss

        opt.step(closure)
        gain = P @ H.T @ torch.linalg.inv(H @ P @ H.T + torch.eye(3).double())
        w, P = w + gain @ (y - H @ w), P - gain @ H @ P
        assert distance([roots[-1] @ v], [w]) < 1e-12


def test_drivers_inside_keep_what_they_remember() -> None:
    task = classify()
    average = EMA(AdamW(task.model, backend="eager"), p=0.1)
    opt = ImplicitMAP(average, steps=2)
    play(opt, task, 3)
    assert average.own["step"] == 6
    with pytest.raises(ValueError, match=r"ImplicitMAP\(SAM"):
        SAM(opt)


@pytest.mark.parametrize(
    "hyper, error, message",
    [
        ({"steps": 0}, ValueError, "steps=0"),
        ({"predict": 3}, TypeError, "predict=3"),
    ],
)
def test_an_impossible_setting_is_refused_by_name(hyper: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ImplicitMAP(SGD(classify().model), **hyper)


def test_a_prediction_of_other_shapes_is_refused_and_changes_nothing() -> None:
    task = bowl_task()
    before = trained(task)
    with pytest.raises(ValueError, match="predict: gave tensors of shapes"):
        play(ImplicitMAP(SGD(task.model), predict=lambda w, t: w[:2]), task, 1)
    assert same(trained(task), before)
