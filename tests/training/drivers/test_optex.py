"""OptEx (OptEx: Expediting First-Order Optimization with Approximately Parallelized Iterations, NeurIPS 2024)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance.problems import distance, same
from torch import Tensor, nn
from training.cases import Bowl, Task, bowl_task, classify, play, trained

from poise.optim import SGD, AdamW, Muon
from poise.training import SAM, OptEx

CASES: list[dict[str, Any]] = [
    {"parallelism": 4, "history": 7, "length_scale": 20.0},
    {"parallelism": 3, "history": 50, "length_scale": [0.1, 5.0, 100.0], "normalize": False, "select": "min_grad_norm"},
    {"parallelism": 3, "history": 50, "length_scale": 50.0, "select": "min_loss", "noise": 0.01},
]
NEUTRAL: dict[str, Any] = {"parallelism": 1}
TYPICAL: dict[str, Any] = {"parallelism": 2, "history": 4}
INNER_STEPS = 2
KEPT = 8


def matern(a: Tensor, b: Tensor, length_scale: float) -> Tensor:
    d = torch.stack([torch.stack([(p - q).norm() for q in b]) for p in a]) / length_scale
    return (1 + 5**0.5 * d + 5 * d**2 / 3) * torch.exp(-(5**0.5) * d)


def reference(
    bowl: Bowl,
    *,
    lr: float,
    steps: int,
    parallelism: int = 4,
    history: int = 50,
    length_scale: Any = 0.1,
    noise: float = 1e-3,
    normalize: bool = True,
    select: str = "last",
) -> tuple[list[Tensor], list[Tensor]]:
    """All weights in one long vector, all branches to their ends, and then the one that was selected."""
    shapes = [w.shape for w in bowl.weights]

    def split(x: Tensor) -> list[Tensor]:
        return [piece.reshape(shape) for piece, shape in zip(x.split([s.numel() for s in shapes]), shapes, strict=True)]

    def gradient(x: Tensor, t: int) -> Tensor:
        return torch.cat([g.flatten() for g in bowl.gradient(split(x), t)])

    def loss(x: Tensor, t: int) -> float:
        terms = zip(split(x), bowl.curvatures, bowl.slopes[t], strict=True)
        return float(sum((h * w**2 / 2 + w**4 / 4 + z * w).sum() for w, h, z in terms))

    def mean(X: Tensor, Y: Tensor, at: Tensor, scale: float, unit: float) -> Tensor:
        K = matern(X / unit, X / unit, scale) + noise * torch.eye(len(X)).double()
        return matern(at / unit, X / unit, scale) @ torch.linalg.inv(K) @ Y

    x = torch.cat([w.flatten() for w in bowl.start()])
    xs: list[Tensor] = []
    gs: list[Tensor] = []
    for t in range(steps):
        points = [x]
        unit = float(torch.stack([a.norm() ** 0.5 for a in xs]).mean()) if xs and normalize else 1.0
        scale = length_scale if isinstance(length_scale, float) else length_scale[0]
        if isinstance(length_scale, list) and len(xs) > parallelism:
            X, Y = torch.stack(xs), torch.stack(gs)
            old, new = slice(None, -parallelism), slice(-parallelism, None)
            errors = [float((mean(X[old], Y[old], X[new], l, unit) - Y[new]).square().sum()) for l in length_scale]
            scale = length_scale[errors.index(min(errors))]
        for _ in range(parallelism - 1):
            guess = mean(torch.stack(xs), torch.stack(gs), points[-1][None], scale, unit)[0] if len(xs) > 1 else 0.0 * x
            points.append(points[-1] - lr * guess)
        true = [gradient(point, t) for point in points]
        values = {
            "last": [float(-i) for i in range(parallelism)],
            "min_loss": [loss(point, t) for point in points],
            "min_grad_norm": [float(g.norm()) for g in true],
        }[select]
        ends = [point - lr * g for point, g in zip(points, true, strict=True)]
        x = ends[values.index(min(values))]
        xs, gs = (xs + points)[-history:], (gs + true)[-history:]
    return split(x), split(x)


def quadratic() -> Task:
    """50 curvatures from 1 down to 1/100, from the point of ones."""
    h = torch.logspace(0, -2, 50, dtype=torch.float64)
    model = nn.Module()
    model.x = nn.Parameter(torch.ones(50, dtype=torch.float64))
    return Task(model, lambda m, _: (h * m.get_parameter("x").square()).sum() / 2, 1)


def final(parallelism: int, steps: int, **hyper: Any) -> float:
    task = quadratic()
    play(OptEx(SGD(task.model, lr=0.5, backend="eager"), parallelism, **hyper), task, steps)
    return float(task.loss(task.model, 0).detach())


def test_four_predicted_steps_in_one_are_worth_four_on_a_quadratic() -> None:
    plain, longer = final(1, 50), final(1, 200)
    four = final(4, 50, length_scale=50.0, normalize=False)
    assert longer < 0.1 * plain
    assert four < 1.02 * longer


@pytest.mark.parametrize("parallelism", [1, 3])
def test_the_prediction_at_a_stored_point_is_its_gradient_where_there_is_no_noise(parallelism: int) -> None:
    task = bowl_task()
    opt = OptEx(SGD(task.model, lr=0.1, backend="eager"), parallelism, length_scale=1.0, noise=1e-14)
    for step in range(3):
        play(opt, task, 1, step)
        with torch.no_grad():
            for p in task.model.parameters():
                p.add_(0.3)
        if step < 2:
            opt.own["count"] = step + 1  # the first of each step
    found = {place: [x[place] for x in opt.own["x"]] for place in range(opt.own["count"])}
    for place, point in found.items():
        predicted = opt.predict(point)
        assert distance(list(predicted), [g[place] for g in opt.own["g"]]) < 1e-10


def test_virtual_steps_to_points_that_are_not_selected_leave_no_trace() -> None:
    """Where the loss rises along the way, the first point is the best, and the step from it is the inner optimizer's."""
    for make in (
        lambda m: AdamW(m, lr=0.01, weight_decay=0.0, backend="eager"),
        lambda m: torch.optim.Adam(m.parameters(), lr=0.01),
        lambda m: Muon(m, lr=0.02, weight_decay=0.0, state="int8", backend="eager"),
    ):
        task, twin = classify(), classify()
        ahead, plain = make(task.model), make(twin.model)
        opt = OptEx(ahead, 3, select="min_loss")
        play(opt, task, 1)
        play(plain, twin, 1)
        assert same(trained(task), trained(twin))  # nothing was known: no step ahead but to where it stood
        opt.own["g"] = [-1e4 * g for g in opt.own["g"]]  # uphill
        play(opt, task, 1)
        play(plain, twin, 1)
        assert same(trained(task), trained(twin))
        for p, q in zip(task.model.parameters(), twin.model.parameters(), strict=True):
            kept, wanted = (list(o.state[w].values()) for o, w in ((ahead, p), (plain, q)))
            assert same(kept, wanted)


def test_the_last_points_state_has_seen_the_predicted_gradients() -> None:
    task = quadratic()
    inner = SGD(task.model, lr=0.1, momentum=0.9, backend="eager")
    opt = OptEx(inner, 2, length_scale=10.0)
    play(opt, task, 3)
    (x,) = trained(task)
    (buffer,) = (inner.state[p]["momentum_buffer"].clone() for p in task.model.parameters())
    (guess,) = opt.predict([x])
    ahead = 0.9 * buffer + guess
    true = torch.logspace(0, -2, 50, dtype=torch.float64) * (x - 0.1 * ahead)
    play(opt, task, 1)
    assert distance(trained(task), [x - 0.1 * ahead - 0.1 * (0.9 * ahead + true)]) < 1e-12


def test_all_true_gradients_enter_the_history_and_the_oldest_leave_it() -> None:
    task = quadratic()
    opt = OptEx(SGD(task.model, lr=0.5, backend="eager"), 3, history=4, length_scale=10.0)
    play(opt, task, 4)
    X, G = opt.own["x"][0], opt.own["g"][0]
    assert opt.own["count"] == 12
    assert distance([G], [torch.logspace(0, -2, 50, dtype=torch.float64) * X]) < 1e-15
    order = [float(row.norm()) for row in X]  # the newest three are the last places but one round: 9, 10, 11 of 4
    assert order[0] > order[1] > order[2] > order[3]


def test_distances_may_be_measured_in_some_coordinates() -> None:
    """In coordinates that do not move, every point is the same, and the prediction is near the mean of all gradients."""
    task = bowl_task()
    opt = OptEx(SGD(task.model, lr=0.1, backend="eager"), 2, coordinates=5)
    play(opt, task, 3)
    drawn = opt._places()
    assert sum(len(at) for at in drawn if at is not None) == 5
    assert all(bool((at < p.numel()).all()) for at, p in zip(drawn, task.model.parameters(), strict=True) if at is not None)
    for X, at in zip(opt.own["x"], drawn, strict=True):
        X.flatten(1)[:, at] = 1.0
    mean = [g[:6].sum(0) / (6 + 1e-3) for g in opt.own["g"]]
    ones = [torch.ones_like(p) for p in task.model.parameters()]
    assert distance(list(opt.predict(ones)), mean) < 1e-6
    before = [at.clone() for at in drawn if at is not None]
    play(opt, task, 1, 3)
    assert not all(torch.equal(a, b) for a, b in zip(before, opt._places(), strict=True) if b is not None)


@pytest.mark.parametrize("torchs", [False, True])
def test_an_error_on_the_way_leaves_weights_state_and_history_as_they_were(torchs: bool) -> None:
    task = classify()
    inner = torch.optim.AdamW(task.model.parameters(), lr=0.1) if torchs else AdamW(task.model, lr=0.1, backend="eager")
    opt = OptEx(inner, 3)
    before = play(opt, task, 2)
    kept = [value.clone() for p in task.model.parameters() for value in opt.state[p].values()]
    history = [x.clone() for x in opt.own["x"]]
    plain = task.closure(opt)

    def closure() -> Tensor:
        if task.calls == 8:
            raise KeyError("ahead")
        return plain()

    with pytest.raises(KeyError, match="ahead"):
        opt.step(closure)
    assert same(trained(task), before)
    assert same([value for p in task.model.parameters() for value in opt.state[p].values()], kept)
    assert same(opt.own["x"], history) and opt.own["count"] == 6


def test_a_parameter_that_comes_later_stood_where_it_stands() -> None:
    task = bowl_task()
    params = list(task.model.parameters())
    opt = OptEx(SGD(params[:2], lr=0.1, backend="eager"), 2)
    play(opt, task, 2)
    opt.add_param_group({"params": params[2:]})
    assert torch.equal(opt.own["x"][2], params[2].detach().expand(50, *params[2].shape))
    assert not opt.own["g"][2].any()


def test_what_cannot_work_is_refused_by_name() -> None:
    model = classify().model
    cases: list[tuple[dict[str, Any], str]] = [
        ({"parallelism": 0}, "parallelism=0"),
        ({"parallelism": 9, "history": 8}, "history=8"),
        ({"history": 1, "parallelism": 1}, "history=1"),
        ({"length_scale": []}, "length_scale"),
        ({"length_scale": [1.0, 0.0]}, "length_scale"),
        ({"noise": 0.0}, "noise=0"),
        ({"coordinates": 0}, "coordinates=0"),
        ({"select": "best"}, "select='best'"),
    ]
    for hyper, message in cases:
        with pytest.raises(ValueError, match=message):
            OptEx(SGD(model), **hyper)
    with pytest.raises(ValueError, match=r"SAM\(OptEx"):
        OptEx(SAM(SGD(model)))
