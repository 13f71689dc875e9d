"""Rules of whole parameters: what a matrix, a batch of equal matrices and a tensor look like to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance.problems import distance, draw, leaves, play, same
from optim.toys import apply, apply_matrix, apply_tensor, gain, heavy, optimizer, zeros
from torch import Tensor

from poise.optim import Context, Param, Slot, chain
from poise.optim.engine import engine
from poise.optim.transform import State


class looking(apply_matrix):
    """Writes down the shapes of what it is given."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.seen: list[tuple[int, ...]] = []

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        assert u.shape == x.shape == k.grad.shape
        self.seen.append(tuple(u.shape))
        return u


class looking_at_tensors(looking):
    unit = "tensor"


def shown(rule: looking, *shapes: tuple[int, ...], names: list[str] | None = None) -> list[tuple[int, ...]]:
    params: Any = zeros(*shapes)
    opt = optimizer(list(zip(names, params, strict=True)) if names else params, chain(gain(2.0), rule, gain(2.0)), lr=1.0)
    grads, _ = draw(shapes, 0)
    assert same(play(opt, params, [list(grads)]), [-4 * g for g in grads])
    return rule.seen


def test_a_matrix_rule_sees_a_convolution_as_one_matrix_of_filters() -> None:
    assert shown(looking(), (8, 4, 3, 3)) == [(8, 36)]


def test_a_matrix_rule_sees_stacked_experts_as_many_matrices() -> None:
    assert shown(looking(), (5, 6, 7), names=["experts.up"]) == [(5, 6, 7)]


def test_equal_matrices_are_given_at_once_and_others_apart() -> None:
    seen = shown(looking(), (4, 6), (6, 4), (4, 6), (2, 3), (4, 6))
    assert sorted(seen) == [(2, 3), (3, 4, 6), (6, 4)]


def test_matrices_of_different_groups_are_not_given_at_once() -> None:
    """A rule's scalars may differ from group to group."""
    scaled = apply_matrix(lambda u, state, x, k: k.factor * u, defaults={"factor": 2.0})
    params = zeros((4, 6), (4, 6), (4, 6))
    opt = optimizer([{"params": params[:2]}, {"params": params[2:], "factor": 5.0}], scaled, lr=1.0)
    one = torch.ones(4, 6, dtype=torch.float64)
    assert same(play(opt, params, [[one] * 3]), [-2 * one, -2 * one, -5 * one])


def test_no_more_matrices_are_held_at_once_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "HELD", 2 * 24)
    assert sorted(shown(looking(), *[(4, 6)] * 5)) == [(2, 4, 6), (2, 4, 6), (4, 6)]


@pytest.mark.parametrize("missing", [None, 0, 1, 2])
def test_each_matrix_of_a_batch_gets_the_update_it_gets_alone(missing: int | None) -> None:
    def inverse(u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return torch.linalg.solve(k.grad @ k.grad.mT + torch.eye(4, dtype=u.dtype), u + 0.1 * x)

    start, grads = draw([(4, 6)] * 3, 3, missing=[] if missing is None else [(1, missing)])
    rule = chain(heavy(), apply_matrix(inverse), heavy())
    params = leaves(start)
    found = play(optimizer(params, rule, lr=0.1), params, grads)
    for i, w in enumerate(start):
        (alone,) = single = leaves([w])
        play(optimizer(single, rule, lr=0.1), single, [[row[i]] for row in grads])
        assert distance([found[i]], [alone]) < 1e-13


@pytest.mark.parametrize("kind", [apply_matrix, apply_tensor])
def test_what_is_fed_reaches_each_matrix_of_a_batch(kind: type[apply]) -> None:
    rule = kind(lambda u, state, x, k: u + k.target.reshape(u.shape), feeds=("target",))
    params = zeros((4, 6), (4, 6), (2, 3))
    opt = optimizer(params, rule, lr=1.0)
    (*targets,), _ = draw([(4, 6), (4, 6), (2, 3)], 0)
    opt.feed(target=targets)
    zero = [torch.zeros_like(p) for p in params]
    assert same(play(opt, params, [list(zero)]), [-t for t in targets])


def test_what_is_fed_to_a_convolution_has_the_shape_of_what_the_rule_sees() -> None:
    rule = apply_matrix(lambda u, state, x, k: u + k.target, feeds=("target",))
    params = zeros((8, 4, 3, 3))
    opt = optimizer(params, rule, lr=1.0)
    (target,), _ = draw([(8, 4, 3, 3)], 0)
    opt.feed(target=[target])
    assert same(play(opt, params, [[torch.zeros(8, 4, 3, 3)]]), [-target])


def test_each_matrix_keeps_its_own_state() -> None:
    averaged = apply_matrix(_averaged, {"buffer": 0.0})
    start, grads = draw([(4, 6), (4, 6), (6, 4)], 4, missing=[(2, 1)])
    params, twin = leaves(start), leaves(start)
    found = play(optimizer(params, averaged, lr=0.1), params, grads)
    assert same(found, play(optimizer(twin, heavy(), lr=0.1), twin, grads))


def _averaged(u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
    state["buffer"] = 0.5 * state["buffer"] + u
    return state["buffer"]


@pytest.mark.parametrize("shape", [(4, 6), (8, 4, 3, 3)])
def test_a_rule_may_hand_on_what_it_kept_and_keep_what_it_was_given(shape: tuple[int, ...]) -> None:
    start, grads = draw([shape], 4)
    params = leaves(start)
    found = play(optimizer(params, apply_matrix(_one_step_late, {"last": 0.0}), lr=1.0), params, grads)
    assert distance(found, [start[0] - sum(row[0] for row in grads[:-1] if row[0] is not None)]) < 1e-14


def _one_step_late(u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
    late = state["last"]
    state["last"] = u
    return late


def test_state_declared_for_a_convolution_has_the_shape_of_what_the_rule_sees() -> None:
    """A slot of the parameter's own shape comes as the update comes, so that the same sentence serves both."""
    start, grads = draw([(8, 4, 3, 3)], 3)
    params, twin = leaves(start), leaves(start)
    opt = optimizer(params, apply_matrix(_averaged, {"buffer": 0.0}), lr=0.1)
    assert same(play(opt, params, grads), play(optimizer(twin, heavy(), lr=0.1), twin, grads))


def test_state_of_another_shape_is_kept_whole() -> None:
    class rows(apply_matrix):
        def slots(self, p: Param) -> dict[str, Slot]:
            return {"rows": Slot((p.shape[0],)), "gram": Slot((p.shape[0], p.shape[0]), init="eye")}

        def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
            state["rows"] = state["rows"] + u.sum(1)
            state["gram"] = state["gram"] + u @ u.T
            return state["gram"] @ (u + state["rows"][:, None])

    start, grads = draw([(3, 5)], 2)
    (p,) = params = leaves(start)
    opt = optimizer(params, rows(), lr=0.1)
    play(opt, params, grads)
    total = sum((row[0].sum(1) for row in grads if row[0] is not None), torch.zeros(3, dtype=torch.float64))
    gram = sum((row[0] @ row[0].T for row in grads if row[0] is not None), torch.eye(3, dtype=torch.float64))
    assert distance([opt.state[p]["rows"], opt.state[p]["gram"]], [total, gram]) < 1e-13


@pytest.mark.parametrize("shape", [(), (5,), (4, 6), (8, 4, 3, 3)])
def test_a_tensor_rule_sees_every_parameter_as_it_is(shape: tuple[int, ...]) -> None:
    assert shown(looking_at_tensors(), shape) == [shape]


def test_a_tensor_rule_sees_one_parameter_at_a_time() -> None:
    assert shown(looking_at_tensors(), (4, 6), (4, 6)) == [(4, 6), (4, 6)]


@pytest.mark.parametrize("kind", [apply_matrix, apply_tensor])
def test_a_blind_rule_is_the_same_rule(kind: type[apply]) -> None:
    """Being blind only saves the gathering of what the rule does not look at."""
    start, grads = draw([(4, 6), (4, 6)], 3)
    ends = []
    for blind in (False, True):
        params = leaves(start)
        rule = kind(lambda u, state, x, k: u / u.norm(dim=(-2, -1), keepdim=True), blind=blind)
        ends.append(play(optimizer(params, chain(heavy(), rule), lr=0.1), params, grads))
    assert same(*ends)


def test_matrix_and_tensor_rules_may_follow_each_other() -> None:
    """The tensor rule sees a convolution with its kernel, the matrix rule without."""
    (start,), ((grad,),) = draw([(4, 3, 2, 2)], 1)
    assert grad is not None
    params = leaves([start])
    transposed = apply_tensor(lambda u, state, x, k: u.transpose(2, 3))
    scaled = apply_matrix(lambda u, state, x, k: u * torch.arange(12.0, dtype=u.dtype))
    found = play(optimizer(params, chain(transposed, scaled, transposed), lr=0.1), params, [[grad]])
    factor = torch.arange(12.0, dtype=torch.float64).reshape(3, 2, 2).transpose(1, 2)
    assert distance(found, [start - 0.1 * grad * factor]) < 1e-14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rules_see_float32_or_better_whatever_the_weights_are(dtype: torch.dtype) -> None:
    seen: list[torch.dtype] = []

    def look(u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        seen.extend([u.dtype, x.dtype, k.grad.dtype, state["buffer"].dtype])
        return u

    params = zeros((4, 6), dtype=dtype)
    play(optimizer(params, apply_matrix(look, {"buffer": 0.0}), lr=1.0), params, [[torch.ones(4, 6)]])
    assert set(seen) == {torch.float64 if dtype is torch.float64 else torch.float32}


@pytest.mark.parametrize("state", ["fp32", "int8"])
@pytest.mark.parametrize("kind", [apply_matrix, apply_tensor])
def test_a_state_written_in_place_and_assigned_is_kept(kind: type[apply], state: str) -> None:
    def add(u: Tensor, held: State, x: Tensor, k: Context) -> Tensor:
        held["sum"].add_(u)
        held["sum"] = held["sum"]
        return held["sum"]

    def plain(u: Tensor, held: State, x: Tensor, k: Context) -> Tensor:
        held["sum"] = held["sum"] + u
        return held["sum"]

    start, grads = draw([(64, 128)], 3)
    ends = []
    for f in (add, plain):
        params = leaves(start)
        opt = optimizer(params, kind(f, {"sum": 0.0}), lr=0.1, state=state)
        kept = {key: t for key, t in opt.state[params[0]].items() if key != "step"}
        ends.append(play(opt, params, grads))
        assert all(opt.state[params[0]][key] is t for key, t in kept.items())
    assert same(*ends)
