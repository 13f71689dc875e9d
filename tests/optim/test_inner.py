"""Rules that drive other rules: inside a split, a rotation, a preconditioner."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conformance.problems import distance, draw, leaves, play, same
from optim.toys import apply, apply_matrix, gain, heavy, numbers, optimizer, update_of, zeros
from torch import Tensor

from poise.optim import Context, Param, Slot, Transform, chain
from poise.optim.transform import State
from poise.optim.transforms.adaptive import adam


class through(Transform):
    """Hands everything on to its inner rule."""

    def __init__(self, inner: Transform) -> None:
        self.inner = (inner,)

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return k.inner[0].apply(u)


class through_matrix(through):
    unit = "matrix"


class halves(Transform):
    """The upper rows go to one rule, the lower rows to another; the lower may be left out on odd steps."""

    unit = "matrix"

    def __init__(self, upper: Transform, lower: Transform, rarely: bool = False) -> None:
        self.inner, self.rarely = (upper, lower), rarely

    def parts(self, p: Param) -> tuple[Param, ...]:
        half = p.shape[0] // 2
        return replace(p, shape=torch.Size((half, p.shape[1]))), replace(p, shape=torch.Size((p.shape[0] - half, p.shape[1])))

    def enter(self, u: Tensor, state: State, x: Tensor, k: Context) -> tuple[Tensor | None, ...]:
        half = u.shape[-2] // 2
        return u[..., :half, :], None if self.rarely and k.step % 2 else u[..., half:, :]

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        upper, lower = self.enter(u, state, x, k)
        assert upper is not None
        below = torch.zeros_like(u[..., u.shape[-2] // 2 :, :]) if lower is None else k.inner[1].apply(lower)
        return torch.cat([k.inner[0].apply(upper), below], dim=-2)


class pure_heavy(Transform):
    """Keeps its average in measure, so that it may be applied to many vectors: `u <- u + average`."""

    pure = True

    def slots(self, p: Param) -> dict[str, Slot]:
        return {"average": Slot(tuple(p.shape))}

    def measure(self, u: Tensor, state: State, x: Tensor, k: Context) -> dict[str, Tensor]:
        state["average"] = 0.5 * state["average"] + u
        return {"sum": u.sum()}

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return (u + state["average"]) * k.total["sum"]


@pytest.mark.parametrize("outer", [through, through_matrix])
def test_a_rule_driven_by_another_does_as_it_would_alone(outer: type[through]) -> None:
    start, grads = draw([(4, 3)], 4)
    alone, driven = leaves(start), leaves(start)
    wanted = play(optimizer(alone, heavy(), lr=0.1, weight_decay=0.1), alone, grads)
    assert same(play(optimizer(driven, outer(heavy()), lr=0.1, weight_decay=0.1), driven, grads), wanted)


@pytest.mark.parametrize("outer", [through, through_matrix])
def test_hyper_parameters_of_inner_rules_stand_in_the_group_and_take_effect(outer: type[through]) -> None:
    start, grads = draw([(4, 3)], 4)
    alone, driven = leaves(start), leaves(start)
    wanted = play(optimizer(alone, adam((0.5, 0.8), 1e-6), lr=0.1), alone, grads)
    opt = optimizer(driven, chain(outer(adam((0.9, 0.999), 1e-6))), lr=0.1)
    assert opt.param_groups[0]["betas"] == (0.9, 0.999)
    opt.param_groups[0]["betas"] = (0.5, 0.8)
    assert same(play(opt, driven, grads), wanted)


def test_an_inner_rule_may_not_set_a_hyper_parameter_to_another_value() -> None:
    with pytest.raises(ValueError, match="'gain'"):
        chain(gain(3.0), through(gain(4.0)))


def test_a_chain_as_an_inner_rule_is_refused_when_it_is_built() -> None:
    with pytest.raises(TypeError, match="inner rule"):
        optimizer(zeros((2,)), chain(through(chain(gain(2.0), heavy()))), lr=1.0)


def test_a_rule_that_owns_its_step_is_refused_inside() -> None:
    with pytest.raises(ValueError, match="owns_step"):
        optimizer(zeros((2,)), chain(through(apply(owns_step=True))), lr=1.0)


def test_each_inner_rule_works_on_what_the_outer_one_hands_it() -> None:
    (u,) = draw([(5, 3)], 0)[0]
    found = update_of(chain(halves(chain_free_gain(2.0), chain_free_gain(3.0))), u)[0]
    assert torch.equal(found, torch.cat([2 * u[:2], 3 * u[2:]]))


def chain_free_gain(factor: float) -> apply:
    return apply(lambda u, state, x, k: factor * u)


def test_gradient_and_weights_are_carried_over_with_the_update() -> None:
    """An inner rule that decays, or corrects by the gradient, must see its own part of them."""
    start, grads = draw([(5, 3)], 1)
    look = apply(lambda u, state, x, k: k.grad + 10 * x)
    params = leaves(start)
    rule = chain(chain_free_gain(7.0), halves(look, chain_free_gain(1.0)))
    found = play(optimizer(params, rule, lr=1.0), params, grads)[0]
    g, x = grads[0][0], start[0]
    assert g is not None
    assert distance([found[:2], found[2:]], [x[:2] - (g + 10 * x)[:2], (x - 7 * g)[2:]]) < 1e-14


def test_state_of_inner_rules_has_names_a_person_can_read() -> None:
    (p,) = params = zeros((5, 3))
    opt = optimizer(params, chain(heavy(), halves(heavy(), heavy())), lr=1.0)
    inside = ["1.halves.0.heavy.buffer", "1.halves.1.heavy.buffer"]
    assert set(opt.state[p]) == {"step", "buffer", *inside}
    assert [tuple(opt.state[p][name].shape) for name in inside] == [(2, 3), (3, 3)]


def test_inner_state_is_saved_and_restored() -> None:
    start, grads = draw([(5, 3)], 6)
    params, fresh = leaves(start), leaves(start)
    opt = optimizer(params, chain(halves(heavy(), adam())), lr=0.1)
    halfway = play(opt, params, grads[:3])
    saved = copy.deepcopy(opt.state_dict())
    wanted = play(opt, params, grads[3:])
    again = optimizer(fresh, chain(halves(heavy(), adam())), lr=0.1)
    again.load_state_dict(saved)
    fresh[0].data.copy_(halfway[0])
    assert same(play(again, fresh, grads[3:]), wanted)


def test_an_inner_rule_that_is_given_nothing_keeps_its_state() -> None:
    (u,) = draw([(4, 3)], 0)[0]
    (p,) = params = zeros((4, 3))
    opt = optimizer(params, chain(halves(heavy(), heavy(), rarely=True)), lr=1.0)
    play(opt, params, [[u], [u], [u]])
    assert torch.equal(opt.state[p]["0.halves.0.heavy.buffer"], 1.75 * u[:2])
    assert torch.equal(opt.state[p]["0.halves.1.heavy.buffer"], u[2:])


def test_running_an_inner_rule_that_was_given_nothing_is_refused() -> None:
    class stubborn(halves):
        def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
            return k.inner[1].apply(u)

    params = zeros((4, 3))
    with pytest.raises(RuntimeError, match=r"heavy.*enter\(\)"):
        play(optimizer(params, chain(stubborn(heavy(), heavy(), rarely=True)), lr=1.0), params, [[torch.ones(4, 3)]])


def test_a_pure_rule_measures_the_gradient_once_however_often_it_is_applied() -> None:
    class twice(through):
        def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
            return k.inner[0].apply(u) + k.inner[0].apply(10 * u)

    (p,) = params = zeros((2,))
    opt = optimizer(params, chain(chain_free_gain(3.0), twice(pure_heavy())), lr=1.0)
    g = numbers(1.0, 2.0)
    found = play(opt, params, [[g]])[0]
    assert torch.equal(found, -((3 * g + g) + (30 * g + g)) * 3.0)
    assert torch.equal(opt.state[p][_key(opt, p)], g)
    play(opt, params, [[g]])
    assert torch.equal(opt.state[p][_key(opt, p)], 1.5 * g)


def _key(opt: torch.optim.Optimizer, p: Tensor) -> str:
    (key,) = set(opt.state[p]) - {"step"}
    return key


class rebased(Transform):
    """Momentum and second moment in coordinates that are negated and exchanged, or begun anew, before every third step."""

    unit = "matrix"
    every = 3

    def __init__(self, how: Callable[[Any], None]) -> None:
        self.inner, self.how = (_kinds(),), how

    def refresh(self, u: Tensor, state: State, x: Tensor, k: Context) -> None:
        if k.step > 1:
            self.how(k.inner[0])

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return k.inner[0].apply(u)


class _kinds(Transform):
    def slots(self, p: Param) -> dict[str, Slot]:
        shape = tuple(p.shape)
        return {
            "signed": Slot(shape),
            "nonneg": Slot(shape, kind="nonneg", init=1.0),
            "upper": Slot(shape, kind="upper"),
            "exact": Slot(shape, kind="exact"),
            "weights": Slot(shape, kind="exact", init="param"),
        }

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        for name in ("signed", "nonneg", "upper", "exact"):
            state[name] = state[name] + u * u if name == "nonneg" else state[name] + u
        return 0 * u


def _rebased(how: Callable[[Any], None]) -> dict[str, Tensor]:
    """State by slot name after three steps along (1, 2; 3, 4), with `how` before the third."""
    start, _ = draw([(2, 2)], 0)
    (p,) = params = leaves(start)
    opt = optimizer(params, chain(rebased(how)), lr=1.0, weight_decay=0.25)
    play(opt, params, [[torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)]] * 4)
    return {key.rpartition(".")[2]: value for key, value in opt.state[p].items() if key != "step"} | {
        "start": start[0],
        "end": p.detach(),
    }


U = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)


def test_a_change_of_basis_rotates_signed_state_and_leaves_what_is_exact() -> None:
    found = _rebased(lambda inner: inner.rebase(lambda t: -t.flip(-1), lambda t: t.flip(-1)))
    turned = -(3 * U).flip(-1)
    assert torch.equal(found["signed"], turned + U)
    assert torch.equal(found["nonneg"], (1 + 3 * U * U).flip(-1) + U * U)
    assert torch.equal(found["upper"], (3 * U).flip(-1) + U)
    assert torch.equal(found["exact"], 4 * U)


def test_without_a_squared_map_nonnegative_state_stays_where_it_is() -> None:
    found = _rebased(lambda inner: inner.rebase(lambda t: -t))
    assert torch.equal(found["signed"], -2 * U)
    assert torch.equal(found["nonneg"], 1 + 4 * U * U)


def test_reset_puts_every_slot_back_to_its_beginning() -> None:
    found = _rebased(lambda inner: inner.reset())
    assert torch.equal(found["signed"], U)
    assert torch.equal(found["nonneg"], 1 + U * U)
    assert torch.equal(found["exact"], U)


def test_an_inner_rule_refreshes_itself_too() -> None:
    class counting(heavy):
        every = 2

        def refresh(self, u: Tensor, state: State, x: Tensor, k: Context) -> None:
            state["buffer"] = state["buffer"] + 1000

    (p,) = params = zeros((2,))
    opt = optimizer(params, chain(through(counting())), lr=1.0)
    play(opt, params, [[numbers(0.0, 0.0)]] * 3)
    assert torch.equal(opt.state[p][_key(opt, p)], numbers(625.0, 625.0))


def test_a_rotation_around_a_rule_is_the_rule_in_rotated_coordinates() -> None:
    """The shape of SOAP, with a fixed basis: Q adam(Q^T g)."""
    basis = torch.linalg.qr(draw([(4, 4)], 0, seed=3)[0][0])[0]

    class rotated(Transform):
        unit = "matrix"

        def __init__(self) -> None:
            self.inner = (adam(),)

        def enter(self, u: Tensor, state: State, x: Tensor, k: Context) -> tuple[Tensor | None, ...]:
            return (basis.T @ u,)

        def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
            return basis @ k.inner[0].apply(basis.T @ u)

    start, grads = draw([(4, 3)], 5)
    params, turned = leaves(start), leaves([basis.T @ start[0]])
    found = play(optimizer(params, chain(rotated()), lr=0.1), params, grads)
    wanted = play(optimizer(turned, adam(), lr=0.1), turned, [[basis.T @ g for g in row if g is not None] for row in grads])
    assert distance(found, [basis @ wanted[0]]) < 1e-13


def test_inner_rules_and_their_driver_draw_different_numbers() -> None:
    def draws() -> apply:
        return apply(lambda u, state, x, k: k.uniform())

    class three(Transform):
        def __init__(self) -> None:
            self.inner = (draws(), draws())

        def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
            return _coded([k.uniform(), k.inner[0].apply(u), k.inner[1].apply(u)])

    found = update_of(chain(three()), torch.zeros(4096, dtype=torch.float64))[0]
    numbers_drawn = _decoded(found)
    for i in range(3):
        for j in range(i):
            assert abs(float(torch.corrcoef(torch.stack([numbers_drawn[i], numbers_drawn[j]]))[0, 1])) < 0.1


def _coded(parts: list[Tensor]) -> Tensor:
    """Three numbers in [0, 1), each to 16 bits, as one float64."""
    return sum((torch.floor(part * 2.0**16) * 2.0 ** (-16 * i) for i, part in enumerate(parts)), torch.zeros_like(parts[0]))


def _decoded(code: Tensor) -> list[Tensor]:
    parts = []
    for _ in range(3):
        parts.append(torch.floor(code))
        code = (code - torch.floor(code)) * 2.0**16
    return parts


def test_links_without_inner_rules_have_no_handles() -> None:
    seen: list[int] = []
    params = zeros((2, 2))
    play(
        optimizer(params, apply_matrix(lambda u, state, x, k: (seen.append(len(k.inner)), u)[1]), lr=1.0),
        params,
        [[torch.ones(2, 2)]],
    )
    assert seen == [0]


class behind(through):
    """Gathers twice before its inner rule begins."""

    def scalars(self, step: int, hyper: Any) -> dict[str, float] | None:
        return None if step <= 2 else {}

    def inner_step(self, step: int) -> int:
        return step - 2


class behind_matrix(behind):
    unit = "matrix"


@pytest.mark.parametrize("outer", [behind, behind_matrix])
def test_an_inner_rule_counts_the_steps_that_it_takes(outer: type[behind]) -> None:
    start, grads = draw([(4, 3)], 6)
    alone, driven = leaves(start), leaves(start)
    wanted = play(optimizer(alone, adam(), lr=0.1), alone, grads[2:])
    assert same(play(optimizer(driven, outer(adam()), lr=0.1), driven, grads), wanted)


def test_an_inner_rule_is_told_and_refreshed_by_its_own_count() -> None:
    seen: list[tuple[str, int]] = []

    class telling(apply_matrix):
        every = 2

        def refresh(self, u: Tensor, state: State, x: Tensor, k: Context) -> None:
            seen.append(("refresh", k.step))

    params = zeros((2, 2))
    inner = telling(lambda u, state, x, k: (seen.append(("update", k.step)), u)[1])
    play(optimizer(params, behind_matrix(inner), lr=1.0), params, [[torch.ones(2, 2)]] * 5)
    assert seen == [("refresh", 1), ("update", 1), ("update", 2), ("refresh", 3), ("update", 3)]


def test_nothing_but_the_update_is_carried_over_to_a_blind_rule() -> None:
    carried: list[float] = []

    class counting(through_matrix):
        def enter(self, u: Tensor, state: State, x: Tensor, k: Context) -> tuple[Tensor | None, ...]:
            carried.append(float(u.sum()))
            return (u,)

    for inner, times in ((adam(), 0), (heavy(), 2)):
        carried.clear()
        params = zeros((2, 2))
        play(optimizer(params, counting(inner), lr=1.0), params, [[torch.ones(2, 2)]])
        assert len(carried) == times


class by_turns(through_matrix):
    """Its inner rule runs in every second pair of steps, and rests in between."""

    rests = True
    every = 2

    def refresh(self, u: Tensor, state: State, x: Tensor, k: Context) -> None:
        k.inner[0].rest()

    def enter(self, u: Tensor, state: State, x: Tensor, k: Context) -> tuple[Tensor | None, ...]:
        return (u if (k.step - 1) % 4 >= 2 else None,)

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return k.inner[0].apply(u) if (k.step - 1) % 4 >= 2 else 0 * u


@pytest.mark.parametrize("state", ["fp32", "bf16", "int8", "int4"])
def test_state_at_rest_is_at_its_beginning_and_takes_no_memory(state: str) -> None:
    start, grads = draw([(64, 128)], 8, dtype=torch.float32)
    (p,) = params = leaves(start)
    opt = optimizer(params, chain(by_turns(heavy())), lr=0.1, state=state)
    twin = leaves(start)
    always = optimizer(twin, chain(through_matrix(heavy())), lr=0.1, state=state).state_bytes()
    sizes = []
    for row in grads:
        play(opt, params, [row])
        sizes.append(opt.state_bytes())
    assert sizes[2] == sizes[3] == sizes[6] == sizes[7] == always
    assert max(sizes[0], sizes[1], sizes[4], sizes[5]) <= 8
    (key,) = {key.partition(".codes")[0].partition(".scale")[0] for key in opt.state[p] if key != "step"}
    m = opt._current().members[0]
    m.state = opt.state[p]
    gradient = grads[6][0], grads[7][0]
    assert gradient[0] is not None and gradient[1] is not None
    wanted = 0.5 * gradient[0] + gradient[1]  # nothing of the first turn is left
    assert distance([m.stores[key].read(m.state)], [wanted]) < {"fp32": 1e-6, "bf16": 0.05, "int8": 0.3, "int4": 2.0}[state]


def test_only_what_declares_it_may_rest_and_only_in_refresh() -> None:
    with pytest.raises(RuntimeError, match="rests=True"):
        _rebased(lambda inner: inner.rest())

    class at_once(by_turns):
        every = 0

        def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
            k.inner[0].rest()
            return u

    params = zeros((2, 2))
    with pytest.raises(RuntimeError, match=r"refresh\(\)"):
        play(optimizer(params, chain(at_once(heavy())), lr=1.0), params, [[torch.ones(2, 2)]])

    class elementwise(through):
        rests = True

    with pytest.raises(ValueError, match="unit 'tensor'"):
        optimizer(zeros((2, 2)), chain(elementwise(heavy())), lr=1.0)
    with pytest.raises(ValueError, match="'param'"):
        optimizer(zeros((2, 2)), chain(by_turns(_kinds())), lr=1.0)


def test_state_of_a_part_follows_the_parameters_dimensions_that_the_part_has() -> None:
    class lower(through_matrix):
        def parts(self, p: Param) -> tuple[Param, ...]:
            return (replace(p, shape=torch.Size((2, p.shape[0]))),)

        def follows(self, p: Param) -> tuple[tuple[int | None, ...] | None, ...]:
            return ((None, 0),)

    class window(through_matrix):
        def slots(self, p: Param) -> dict[str, Slot]:
            return {"window": Slot((5, *p.shape), dims=(None, 0, 1))}

    opt = optimizer(zeros((6, 3)), chain(lower(window(heavy()))), lr=1.0)
    (m,) = opt._current().members
    assert {key.rpartition(".")[2]: dims for key, dims in m.dims.items()} == {"window": (None, None, 0), "buffer": (None, 0)}


def test_reset_and_a_change_of_basis_reach_the_rules_inside_an_inner_rule() -> None:
    class deep(rebased):
        def __init__(self, how: Callable[[Any], None]) -> None:
            self.inner, self.how = (through_matrix(heavy()),), how

    for how, wanted in ((lambda inner: inner.rebase(lambda t: -t), -0.875 * U), (lambda inner: inner.reset(), 0 * U)):
        (p,) = params = zeros((2, 2))
        opt = optimizer(params, chain(deep(how)), lr=1.0)
        play(opt, params, [[0 * U]] * 3)
        play(opt, params, [[U]] * 3)
        assert torch.equal(opt.state[p][_key(opt, p)], 1.75 * U)
        play(opt, params, [[0 * U]])  # before it, the second refresh
        assert torch.equal(opt.state[p][_key(opt, p)], wanted)
