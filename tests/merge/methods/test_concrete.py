"""Concrete subspace learning (arXiv 2312.06173)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from conformance.cases import mutated
from merge.cutting import State, largest_gap, same
from torch import Tensor, nn

from poise import catalog
from poise.merge import merge_tensors
from poise.merge.methods.concrete import ConcreteMask, ConcreteMerging, entropy
from poise.merge.methods.task_arithmetic import task_arithmetic

A, B, C = slice(0, 10), slice(10, 20), slice(20, 30)  # features of the first task, of the second, and of both


def linear(weight: Tensor | None = None) -> nn.Linear:
    net = nn.Linear(30, 2, bias=False)
    if weight is not None:
        net.weight.data = torch.stack([weight, -weight])
    return net


def planted() -> tuple[State, list[State]]:
    """Each task uses a half of C, a little help to itself, which says the opposite in the other task."""
    one, two = torch.zeros(30), torch.zeros(30)
    one[A], one[20:25] = 1.0, 1.0
    two[B], two[25:30] = 1.0, 1.0
    start = torch.randn(30, generator=torch.Generator().manual_seed(5)) * 0.02
    base = {"weight": torch.stack([start, -start])}
    return base, [{"weight": base["weight"] + torch.stack([w, -w])} for w in (one, two)]


def data(task: int, seed: int, size: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (size,), generator=generator)
    x = torch.randn(size, 30, generator=generator) * 0.8
    sign = (1.0 - 2.0 * y)[:, None]
    x[:, A if task == 0 else B] += 0.5 * sign
    for half, own in ((slice(20, 25), 0), (slice(25, 30), 1)):
        x[:, half] += (0.1 if task == own else -0.5) * sign
    return x, y


def batches(start: int = 0) -> Iterator[list[Tensor]]:
    """Without labels."""
    for i in range(10**6):
        yield [data(task, start + 2 * i + task)[0] for task in range(2)]


def accuracy(state: State) -> float:
    return (
        sum(float(((x @ state["weight"].mT).argmax(1) == y).float().mean()) for x, y in (data(t, 999, 4000) for t in (0, 1)))
        / 2
    )


def learner(**settings: Any) -> ConcreteMerging:
    base, models = planted()
    return ConcreteMerging(linear(), base, models, **settings)


@cache
def learned() -> ConcreteMerging:
    merging = learner(lr=0.05)
    merging.fit(batches(), 80)
    return merging


def test_saturated_logits_are_task_arithmetic() -> None:
    base, models = planted()
    found = learner(initial=30.0).result()
    plain = base["weight"]
    for model in models:
        plain = plain + torch.tensor(0.3) * (model["weight"] - base["weight"])
    assert torch.equal(found["weight"], plain)
    assert largest_gap(found, merge_tensors(task_arithmetic, models, base, lambda_=0.3)) < 1e-6


def test_a_mask_that_is_the_same_everywhere_is_scaled_away() -> None:
    even = {"weight": torch.full((2, 30), 0.4)}
    full = {"weight": torch.ones(2, 30)}
    assert largest_gap(learner().result(even), learner().result(full)) < 1e-6
    base, models = planted()
    wrong = mutated(catalog.get("concrete"))(linear(), base, models)
    assert largest_gap(wrong.result(even), wrong.result(full)) > 0.1


def test_at_logits_of_zero_the_mask_is_a_half_in_the_mean() -> None:
    drawn = ConcreteMask({"w": torch.zeros(100_000)})
    m = drawn(drawn.draw())["w"].detach()
    assert float(m.mean()) == pytest.approx(0.5, abs=0.006)
    assert 0 <= float(m.min()) < 0.01 and 0.99 < float(m.max()) <= 1
    assert torch.equal(drawn()["w"], torch.full((100_000,), 0.5))


def test_the_gradient_along_a_draw_is_that_of_finite_differences() -> None:
    mask = ConcreteMask({"w": torch.zeros(40)}, initial=0.3)
    u = mask.draw()
    target = torch.randn(40, generator=torch.Generator().manual_seed(1)).double()
    mask.double()

    def value() -> Tensor:
        m = mask({"w": u["w"].double()})["w"]
        return (m / m.mean() * target).square().sum()

    value().backward()
    x = mask.logits[0]
    assert x.grad is not None
    for i in (0, 7, 39):
        ends = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                x[i] += step
                ends.append(float(value()))
                x[i] -= step
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(float(x.grad[i]), rel=1e-5)


def test_the_mask_leaves_out_what_the_tasks_conflict_on_and_both_are_better_for_it() -> None:
    base, models = planted()
    mask = learned().final_mask("mean")["weight"]
    conflicting, other = float(mask[:, C].mean()), float(mask[:, :20].mean())
    assert conflicting < other - 0.2, (conflicting, other)
    plain = accuracy(merge_tensors(task_arithmetic, models, base, lambda_=0.3))
    assert accuracy(learned().result(learned().final_mask("mean"))) > plain + 0.02
    assert accuracy(learned().result()) > plain + 0.02


def test_neither_base_nor_network_nor_models_are_changed() -> None:
    base, models = planted()
    net = linear()
    before = [{n: t.clone() for n, t in s.items()} for s in (base, *models, net.state_dict())]
    merging = ConcreteMerging(net, base, models, form="adamerging")
    merging.fit(batches(), 2)
    merging.result()["weight"].fill_(7.0)
    assert all(same(a, b) for a, b in zip(before, (base, *models, net.state_dict()), strict=True))


def test_a_hard_mask_is_of_zeros_and_ones() -> None:
    mask = learned().final_mask("hard")["weight"]
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert float(mask[:, C].mean()) < float(mask[:, :20].mean())


@pytest.mark.parametrize("per, shape", [("task", (2,)), ("tensor", (2, 1))])
def test_lambda_begins_every_step_anew_and_its_first_one_takes_it_to_an_end(
    per: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    merging = learner(form="adamerging", per=per)
    seen: list[tuple[Tensor, Tensor]] = []
    train = merging._train_lambda

    def watched(*args: Any) -> None:
        before = merging.lambdas.detach().clone()
        train(*args)
        seen.append((before, merging.lambdas.detach().clone()))

    monkeypatch.setattr(merging, "_train_lambda", watched)
    merging.fit(batches(), 2)
    assert all(torch.equal(before, torch.full(shape, 0.3)) for before, _ in seen)
    assert set(seen[0][1].flatten().tolist()) <= {0.0, 1.0}


def test_lambda_is_trained_under_the_mask_that_stays() -> None:
    merging = learner(form="adamerging", lr=0.05)
    merging.fit(batches(), 40)
    mask = merging.freeze(batches(5000), steps=60, lr=0.02)
    assert bool(((merging.lambdas >= 0) & (merging.lambdas <= 1)).all())
    trained = entropy(data(0, 999)[0] @ merging.result(mask)["weight"].mT)
    with torch.no_grad():
        merging.lambdas.fill_(0.3)
    assert trained < entropy(data(0, 999)[0] @ merging.result(mask)["weight"].mT)


def test_entropy_is_that_of_the_predicted_distribution() -> None:
    assert float(entropy(torch.zeros(3, 4))) == pytest.approx(torch.tensor(4.0).log().item())
    assert float(entropy(torch.tensor([[100.0, 0.0]]))) == pytest.approx(0, abs=1e-6)


def test_bad_settings_are_refused() -> None:
    base, models = planted()
    with pytest.raises(ValueError, match="form='ties'"):
        learner(form="ties")
    with pytest.raises(ValueError, match="temperature=0"):
        learner(temperature=0.0)
    with pytest.raises(ValueError, match="1 for 2 tasks"):
        learner().step([torch.zeros(1, 30)])
    with pytest.raises(ValueError, match="model 0: tensor 'weight' is missing"):
        ConcreteMerging(linear(), base, [{}])
    with pytest.raises(ValueError, match="form='adamerging' alone"):
        learner().freeze(batches())
    assert models
