"""What every embedded task must keep, and what each says of itself."""

from __future__ import annotations

import pickle
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from poise.compare.loop import evaluate
from poise.compare.tasks import EMBEDDED, Task, load
from poise.compare.tasks.digits import pixels
from poise.compare.tasks.problems import Convex, Factors, IllConditioned, MatrixRecovery

SMALL = sorted(set(EMBEDDED) - {"code-lm"})


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", SMALL)
def test_the_order_of_the_data_hangs_on_the_seed_alone(name: str) -> None:
    def first(seed: int) -> list[Any]:
        return list(islice(load(name).batches("train", seed), 3))

    for one, again, other in zip(first(1), first(1), first(2), strict=True):
        assert same(one, again) and not same(one, other)


@pytest.mark.parametrize("name", SMALL)
def test_held_out_batches_end_and_are_the_same_for_every_seed(name: str) -> None:
    task = load(name)
    for split in ("tune", "report"):
        ours, theirs = list(task.batches(split, 0)), list(task.batches(split, 1))
        assert 0 < len(ours) == len(theirs) and all(map(same, ours, theirs))


@pytest.mark.parametrize("name", SMALL)
def test_the_fingerprint_is_the_datas(name: str) -> None:
    assert load(name).fingerprint == load(name).fingerprint
    data = {other.removesuffix("-small").removesuffix("-large") for other in SMALL}  # sizes of a model share their data
    assert len({load(other).fingerprint for other in SMALL}) == len(data)


@pytest.mark.parametrize("name", SMALL)
def test_a_task_goes_to_another_process(name: str) -> None:
    task = load(name)
    twin: Task = pickle.loads(pickle.dumps(task))
    assert twin.fingerprint == task.fingerprint
    assert same(next(twin.batches("train", 3)), next(task.batches("train", 3)))


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "code-lm-large" else n for n in SMALL])
def test_a_few_steps_of_adam_learn_something(name: str) -> None:
    task = load(name)
    torch.manual_seed(0)
    model = task.model()
    before = evaluate(task, model, "report", 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for batch in islice(task.batches("train", 0), 40 if name == "code-lm-large" else 100):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    assert evaluate(task, model, "report", 0) < 0.8 * before


def test_digits_are_real_and_stand_in_one_split_each() -> None:
    task: Any = load("digits")
    images, classes = pixels()
    assert images.shape == (1797, 64) and float(images.max()) == 1.0
    parts = [task.members[split] for split in ("train", "tune", "report")]
    assert sorted(np.concatenate(parts)) == list(range(1797))
    for part in parts:  # every class in every split, in about the same share
        assert np.bincount(classes[part]).min() > 0.08 * len(part)


def test_an_epoch_reads_every_image_once() -> None:
    task: Any = load("digits")
    seen = torch.cat([images for images, _ in islice(task.batches("train", 0), len(task.members["train"]) // 64)])
    train = torch.from_numpy(task.data[0][task.members["train"]])
    distances = torch.cdist(seen.view(-1, 64), train)
    assert len(seen) == 64 * (len(train) // 64) and (distances.amin(1) == 0).all()
    assert len(torch.unique(distances.argmin(1))) > 0.99 * len(seen)  # but for twins among the images


def put(model: nn.Module, *weights: np.ndarray) -> nn.Module:
    with torch.no_grad():
        for p, w in zip(model.parameters(), weights, strict=True):
            p.copy_(torch.from_numpy(w))
    return model


@pytest.mark.parametrize("name", ["ill-conditioned", "non-smooth"])
def test_the_truth_has_the_loss_that_is_called_the_optimum(name: str) -> None:
    task: Any = load(name)
    assert evaluate(task, put(task.model(), task.truth[0]), "report", 0) == pytest.approx(task.optimum, abs=1e-6)


def test_the_matrix_is_recovered_by_its_own_factors() -> None:
    task = MatrixRecovery()
    u, s, v = np.linalg.svd(task.truth)
    root = np.zeros(6)
    root[:3] = np.sqrt(s[:3])
    assert s[3] < 1e-12 and np.sum(s**2) == pytest.approx(1.0)
    model = put(Factors(48, 32, 6), u[:, :6] * root, v[:6].T * root)
    assert evaluate(task, model, "report", 0) == pytest.approx(0.0, abs=1e-9)


def test_the_conditioning_is_the_one_that_is_named() -> None:
    x = IllConditioned().draw(np.random.default_rng(0), 200_000)[0].double()
    eigenvalues = torch.linalg.eigvalsh(x.T @ x / len(x))
    assert float(eigenvalues[-1] / eigenvalues[0]) == pytest.approx(1e4, rel=0.1)


def test_no_model_is_below_the_optimum_of_the_convex_problem_and_its_gradient_there_is_zero() -> None:
    task = Convex()
    model = nn.Linear(64, 10).double()
    batch = (task.data[0].double(), task.data[1])
    solver = torch.optim.LBFGS(model.parameters(), max_iter=2000, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        solver.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()
        return loss

    solver.step(closure)  # from another start: a strongly convex problem has one optimum
    assert float(task.loss(model, batch).detach()) == pytest.approx(task.optimum, abs=1e-9)
    for direction in range(3):
        torch.manual_seed(direction)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1e-3 * torch.randn_like(p))
        assert float(task.loss(model, batch).detach()) > task.optimum


def test_an_unknown_task_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="matrix-recovery"):
        load("matrix")
