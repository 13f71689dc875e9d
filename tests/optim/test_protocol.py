"""The protocol of one rule: what a chain is, what a link declares, and what it may know when."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from conformance.problems import Grads, distance, draw, leaves, play, same
from optim.toys import apply, apply_matrix, apply_tensor, gain, heavy, numbers, optimizer, ramp, update_of, zeros
from torch import Tensor

from poise.optim import Context, Optimizer, Param, Slot, Transform, chain
from poise.optim.transform import State

# -- chains -----------------------------------------------------------------------------------------------------------


def test_chains_inside_a_chain_are_taken_apart_in_order() -> None:
    a, b, c, d = gain(), heavy(), apply(), apply()
    assert chain(a, chain(b, chain(c)), d).links == (a, b, c, d)


def test_links_are_applied_from_left_to_right() -> None:
    add = apply(lambda u, state, x, k: u + 1)
    assert torch.equal(update_of(chain(add, gain(3.0)), numbers(1.0))[0], numbers(6.0))
    assert torch.equal(update_of(chain(gain(3.0), add), numbers(1.0))[0], numbers(4.0))


def test_a_chain_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one link"):
        chain()


def test_a_link_that_is_no_transform_is_refused_by_its_value() -> None:
    with pytest.raises(TypeError, match="sign"):
        chain(gain(), torch.sign)  # pyright: ignore[reportArgumentType]


def test_a_link_that_owns_the_step_may_only_stand_last() -> None:
    owner = apply(owns_step=True)
    assert chain(gain(), owner).owns_step
    assert not chain(gain()).owns_step
    with pytest.raises(ValueError, match=re.escape(repr(owner))):
        chain(owner, gain())
    with pytest.raises(ValueError, match="owns_step"):
        chain(chain(gain(), owner), gain())


def test_two_links_share_a_hyper_parameter_only_with_one_value() -> None:
    assert chain(gain(3.0), gain(3.0)).defaults == {"gain": 3.0}
    with pytest.raises(ValueError, match=r"'gain'.*3\.0.*4\.0"):
        chain(gain(3.0), gain(4.0))


def test_a_group_sets_a_shared_hyper_parameter_for_both_links() -> None:
    params = zeros((1,), (1,))
    opt = optimizer([{"params": params[:1]}, {"params": params[1:], "gain": 5.0}], chain(gain(3.0), gain(3.0)), lr=1.0)
    found = play(opt, params, [[numbers(1.0), numbers(1.0)]])
    assert [float(w) for w in found] == [-9.0, -25.0]


# -- hyper-parameters and scalars ----------------------------------------------------------------------------------------


def test_by_default_every_hyper_parameter_is_a_scalar_of_the_same_name() -> None:
    class two(Transform):
        defaults = {"first": 2, "second": 0.5}

        def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
            return k.first * u + k.second

    params = zeros((1,))
    opt = optimizer(params, two(), lr=1.0)
    assert {"first": 2, "second": 0.5}.items() <= opt.param_groups[0].items()
    play(opt, params, [[numbers(3.0)]])
    opt.param_groups[0]["second"] = 100.0
    assert float(play(opt, params, [[numbers(3.0)]])[0]) == -6.5 - 106.0


def test_scalars_are_given_the_parameters_own_step_and_its_group() -> None:
    class spy(Transform):
        defaults = {"speed": 1.0}

        def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float]:
            return {"now": 100.0 * hyper["speed"] + step}

        def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
            return 0 * u + k.now

    params = zeros((1,), (1,))
    opt = optimizer([{"params": params[:1]}, {"params": params[1:], "speed": 2.0}], spy(), lr=1.0)
    one = numbers(0.0)
    found = play(opt, params, [[one, one], [one, None], [one, one]])
    assert [float(w) for w in found] == [-(101.0 + 102 + 103), -(201.0 + 202)]


def test_scalars_keep_their_double_precision_until_they_are_used() -> None:
    """0.999^t cancels in 1 - 0.999^t: in float32 the last digits of a bias correction would be noise."""

    class tiny(Transform):
        def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float]:
            return {"one": 1.0 + 2.0**-40}

        def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
            return u * k.one - u

    assert torch.equal(update_of(tiny(), numbers(1.0))[0], numbers(2.0**-40))


@pytest.mark.parametrize("name", ["step", "clock", "param"])
def test_what_would_be_baked_into_a_kernel_is_refused_with_the_way_out(name: str) -> None:
    rule = apply(lambda u, state, x, k: u * getattr(k, name))
    params = zeros((2,))
    with pytest.raises(AttributeError, match=rf"k\.{name}.*scalars\(\)"):
        play(optimizer(params, rule, lr=1.0), params, [[numbers(1.0, 2.0)]])


def test_an_unknown_scalar_is_refused_with_those_there_are() -> None:
    params = zeros((1,))
    rule = chain(gain(), apply(lambda u, state, x, k: k.gian * u, defaults={"gain": 2.0, "other": 1.0}))
    with pytest.raises(AttributeError, match=r"k\.gian does not exist.*gain.*other"):
        play(optimizer(params, rule, lr=1.0), params, [[numbers(1.0)]])


def test_rules_of_whole_matrices_may_read_step_and_parameter() -> None:
    seen: list[Any] = []

    def look(u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        seen.append((k.step, k.param.name, tuple(k.param.shape)))
        return u

    params = zeros((2, 3))
    play(optimizer([("w", params[0])], apply_matrix(look), lr=1.0), params, [[torch.ones(2, 3)]] * 2)
    assert seen == [(1, "w", (2, 3)), (2, "w", (2, 3))]


def test_the_raw_gradient_is_there_behind_other_links() -> None:
    rule = chain(gain(10.0), apply(lambda u, state, x, k: u + k.grad))
    assert torch.equal(update_of(rule, numbers(1.0, 2.0))[0], numbers(11.0, 22.0))


# -- state ---------------------------------------------------------------------------------------------------------------


def test_state_has_its_plain_name_where_that_is_unique() -> None:
    (p,) = params = zeros((2,))
    opt = optimizer(params, chain(heavy(), apply(slots={"other": 0.0})), lr=1.0)
    assert list(opt.state[p]) == ["step", "buffer", "other"]


def test_state_that_two_links_call_alike_has_place_and_link_before_it() -> None:
    (p,) = params = zeros((2,))
    opt = optimizer(params, chain(heavy(), apply(slots={"other": 0.0}), heavy()), lr=1.0)
    assert list(opt.state[p]) == ["step", "0.heavy.buffer", "other", "2.heavy.buffer"]
    play(opt, params, [[numbers(1.0, 2.0)]] * 2)
    assert torch.equal(opt.state[p]["0.heavy.buffer"], numbers(1.5, 3.0))
    assert torch.equal(opt.state[p]["2.heavy.buffer"], numbers(2.0, 4.0))


def test_the_name_of_the_step_count_is_taken() -> None:
    with pytest.raises(ValueError, match="'step'"):
        optimizer(zeros((2,)), apply(slots={"step": 0.0}), lr=1.0)


def test_state_begins_as_it_was_declared() -> None:
    start, _ = draw([(3, 3), (2, 3)], 0)
    params = leaves(start)
    kept: dict[str, float | Slot] = {
        "number": 2.5,
        "identity": Slot((2, 3, 3), init="eye"),
        "copy": Slot((), init=0.0),
        "count": Slot((4,), dtype=torch.int64, kind="exact"),
    }
    opt = optimizer(params, apply_matrix(slots=kept), lr=1.0)
    state = opt.state[params[0]]
    assert same([state["number"]], [torch.full((3, 3), 2.5, dtype=torch.float64)])
    assert same([state["identity"]], [torch.stack([torch.eye(3, dtype=torch.float64)] * 2)])
    assert same([state["count"]], [torch.zeros(4, dtype=torch.int64)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_state_that_begins_as_the_parameter_is_a_copy_in_the_computing_dtype(dtype: torch.dtype) -> None:
    start, grads = draw([(5, 3)], 2, dtype=dtype)

    class anchored(Transform):
        def slots(self, p: Param) -> dict[str, Slot]:
            return {"anchor": Slot(tuple(p.shape), init="param")}

        def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
            return u + (x - state["anchor"])

    params = leaves(start)
    opt = optimizer(params, anchored(), lr=0.1)
    play(opt, params, grads)
    computing = torch.float64 if dtype is torch.float64 else torch.float32
    assert same([opt.state[params[0]]["anchor"]], [start[0].to(computing)])


@pytest.mark.parametrize("misuse", ["unknown", "deleted"])
def test_state_that_was_not_declared_or_is_taken_away_is_refused(misuse: str) -> None:
    def wrong(u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        if misuse == "deleted":
            del state["kept"]
        else:
            state["bufer"] = u
        return u

    params = zeros((2,))
    with pytest.raises((TypeError, KeyError), match="kept" if misuse == "deleted" else "bufer"):
        play(optimizer(params, apply(wrong, {"kept": 0.0}), lr=1.0), params, [[numbers(1.0, 2.0)]])


# What a rule assigns to its state may be one of its inputs; all of them are to be read before any is overwritten.


def _previous_weights(u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
    state["a"] = x
    return u


def _previous_gradient(u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
    state["b"], state["a"] = state["a"], k.grad
    return u


def _previous_updates(u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
    state["b"] = state["a"]
    state["a"] = u
    return 2 * u


def _exchanged(u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
    state["a"], state["b"] = state["b"], state["a"]
    return u


REMEMBERED = {
    "the weights before the step": (_previous_weights, lambda x, g, u: (x, 2.0)),
    "two gradients": (_previous_gradient, lambda x, g, u: (g, 1.0)),
    "two updates": (_previous_updates, lambda x, g, u: (u, 1.0)),
    "two slots exchanged": (_exchanged, lambda x, g, u: (2.0, 1.0)),
}


@pytest.mark.parametrize("what", REMEMBERED)
@pytest.mark.parametrize("link", [apply, apply_matrix])
@pytest.mark.parametrize("backend", ["eager", "chunks"])
def test_what_is_remembered_is_the_value_before_the_step(what: str, link: type[apply], backend: Any) -> None:
    rule, wanted = REMEMBERED[what]
    (start,), ((grad,),) = draw([(6, 5)], 1, dtype=torch.float32)
    assert grad is not None
    (p,) = params = leaves([start])
    # matrix rules stand between element rules, so that what reaches them and what leaves them goes on to be overwritten
    opt = Optimizer(params, chain(gain(3.0), link(rule, {"a": 1.0, "b": 2.0}), gain(3.0)), lr=0.1, backend=backend)
    play(opt, params, [[grad]])
    for name, value in zip("ab", wanted(start, grad, 3.0 * grad), strict=True):
        expected = value if isinstance(value, Tensor) else torch.full((6, 5), value)
        assert torch.equal(opt.state[p][name], expected), name


# -- steps that only gather ------------------------------------------------------------------------------------------------


class accumulate(Transform):
    """Every second step, the mean of the last two gradients."""

    def slots(self, p: Param) -> dict[str, Slot]:
        return {"sum": Slot(tuple(p.shape))}

    def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float] | None:
        return {"share": 0.5} if step % 2 == 0 else None

    def measure(self, u: Tensor, state: State, x: Tensor, k: Context) -> dict[str, Tensor]:
        state["sum"] = state["sum"] + u
        return {}

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        mean = k.share * state["sum"]
        state["sum"] = torch.zeros_like(u)
        return mean


def test_a_step_that_only_gathers_is_counted_and_changes_only_what_was_measured() -> None:
    start, grads = draw([(4, 3)], 1)
    (p,) = params = leaves(start)
    opt = optimizer(params, chain(accumulate(), heavy()), lr=0.1, weight_decay=0.5)
    play(opt, params, grads)
    assert same([p], start)
    assert int(opt.state[p]["step"]) == 1
    assert torch.equal(opt.state[p]["buffer"], torch.zeros(4, 3, dtype=torch.float64))
    assert torch.equal(opt.state[p]["sum"], grads[0][0])  # pyright: ignore[reportArgumentType]


def test_gathering_trains_as_the_mean_gradients_do() -> None:
    start, grads = draw([(4, 3), (5,)], 6)
    params, twin = leaves(start), leaves(start)
    found = play(optimizer(params, chain(accumulate(), heavy()), lr=0.1, weight_decay=0.5), params, grads)
    means: Grads = [
        [0.5 * (a + b) for a, b in zip(*rows, strict=True) if a is not None and b is not None]
        for rows in zip(grads[::2], grads[1::2], strict=True)
    ]
    assert same(found, play(optimizer(twin, heavy(), lr=0.1, weight_decay=0.5), twin, means))


@pytest.mark.parametrize("late", [0, 1])
def test_one_parameter_gathers_while_another_moves(late: int) -> None:
    """After a missing gradient the two count differently; which of them comes first must not matter."""
    start, grads = draw([(4,), (4,)], 5, missing=[(0, late)])
    params, twin = leaves(start), leaves(start)
    found = play(optimizer(params, chain(accumulate(), heavy()), lr=0.1), params, grads)
    wanted = []
    for i in range(2):
        alone = [[row[i]] for row in grads if row[i] is not None]
        wanted += play(optimizer(twin[i : i + 1], chain(accumulate(), heavy()), lr=0.1), twin[i : i + 1], alone)
    assert same(found, wanted)


# -- refresh -------------------------------------------------------------------------------------------------------------


class refreshed(Transform):
    """The gradient of the last refresh, times how often there was one."""

    def __init__(self, every: int = 3) -> None:
        self.every = every

    def slots(self, p: Param) -> dict[str, Slot]:
        return {"held": Slot(tuple(p.shape)), "times": Slot(tuple(p.shape))}

    def refresh(self, u: Tensor, state: State, x: Tensor, k: Context) -> None:
        state["held"] = u * 1.0
        state["times"] = state["times"] + k.step

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return state["held"]


def test_refresh_runs_before_the_first_step_of_each_period_on_the_raw_gradient() -> None:
    (p,) = params = zeros((1,))
    opt = optimizer(params, chain(gain(100.0), refreshed(3)), lr=1.0)
    moved = []
    for t in range(1, 8):
        before = p.item()
        play(opt, params, [[numbers(float(t))]])
        moved.append(before - p.item())
    assert moved == [1.0, 1.0, 1.0, 4.0, 4.0, 4.0, 7.0]
    assert float(opt.state[p]["times"]) == 1 + 4 + 7


def test_refresh_follows_the_parameters_own_steps() -> None:
    (p, q) = params = zeros((1,), (1,))
    opt = optimizer(params, refreshed(2), lr=1.0)
    row: list[Tensor | None] = [numbers(1.0), numbers(1.0)]
    play(opt, params, [row, [row[0], None], row, row])
    assert float(opt.state[p]["times"]) == 1 + 3
    assert float(opt.state[q]["times"]) == 1 + 3


def test_refresh_sees_the_whole_tensor_in_its_own_shape() -> None:
    seen: list[tuple[int, ...]] = []

    class look(refreshed):
        def refresh(self, u: Tensor, state: State, x: Tensor, k: Context) -> None:
            seen.append((*u.shape, *x.shape, *state["held"].shape))

    params = zeros((2, 3, 4))
    play(optimizer(params, look(1), lr=1.0), params, [[torch.ones(2, 3, 4)]])
    assert seen == [(2, 3, 4) * 3]


def test_a_rule_may_say_itself_when_it_is_due() -> None:
    class doubling(refreshed):
        def due(self, step: int) -> bool:
            return step in (2, 4)

    (p,) = params = zeros((1,))
    opt = optimizer(params, doubling(0), lr=1.0)
    play(opt, params, [[numbers(1.0)]] * 5)
    assert float(opt.state[p]["times"]) == 2 + 4


def test_without_a_period_refresh_never_runs() -> None:
    (p,) = params = zeros((1,))
    opt = optimizer(params, refreshed(0), lr=1.0)
    play(opt, params, [[numbers(1.0)]] * 3)
    assert float(opt.state[p]["times"]) == 0


# -- feeds ---------------------------------------------------------------------------------------------------------------


def fed() -> apply:
    return apply(lambda u, state, x, k: u + 10 * k.target, feeds=("target",))


def test_a_step_without_what_a_rule_must_be_fed_is_refused_before_anything_moves() -> None:
    (p,) = params = zeros((2,))
    opt = optimizer([("w", p)], fed(), lr=1.0)
    with pytest.raises(RuntimeError, match=r"'target'.*'w'.*opt\.feed\(target="):
        play(opt, params, [[numbers(1.0, 2.0)]])
    assert torch.equal(p, numbers(0.0, 0.0))
    assert int(opt.state[p]["step"]) == 0


@pytest.mark.parametrize("how", ["list", "by name", "by parameter"])
def test_what_is_fed_reaches_the_update_of_its_parameter(how: str) -> None:
    params = zeros((2,), (1,))
    opt = optimizer([("v", params[0]), ("w", params[1])], fed(), lr=1.0)
    tensors = [numbers(1.0, 2.0), numbers(3.0)]
    given: Any = {
        "list": tensors,
        "by name": dict(zip("vw", tensors, strict=True)),
        "by parameter": dict(zip(params, tensors, strict=True)),
    }[how]
    opt.feed(target=given)
    found = play(opt, params, [[numbers(0.0, 0.0), numbers(0.5)]])
    assert same(found, [numbers(-10.0, -20.0), numbers(-30.5)])


@pytest.mark.parametrize("kind", [apply, apply_matrix, apply_tensor])
def test_what_is_fed_is_seen_in_phase_one_as_the_gradient_is(kind: type[apply]) -> None:
    """A convolution's as the matrix that it is, where the rule sees one."""

    def measure(self: Any, u: Tensor, state: State, x: Tensor, k: Context) -> dict[str, Tensor]:
        return {"product": (u * k.target).sum()}

    measuring = type(kind.__name__, (kind,), {"measure": measure})
    params = zeros((2, 3, 2))
    opt = optimizer(params, measuring(lambda u, state, x, k: u * k.total["product"], feeds=("target",)), lr=1.0)
    gradient, target = ramp(2, 3, 2), ramp(2, 3, 2).flip(0, 1, 2)
    opt.feed(target=[target])
    assert distance(play(opt, params, [[gradient]]), [-gradient * (gradient * target).sum()]) < 1e-12


def test_what_is_fed_is_used_up_by_one_step() -> None:
    params = zeros((1,))
    opt = optimizer(params, fed(), lr=1.0)
    opt.feed(target=[numbers(1.0)])
    play(opt, params, [[numbers(0.0)]])
    with pytest.raises(RuntimeError, match="'target'"):
        play(opt, params, [[numbers(0.0)]])


def test_a_parameter_without_gradient_need_not_be_fed() -> None:
    params = zeros((1,), (1,))
    opt = optimizer(params, fed(), lr=1.0)
    opt.feed(target={params[1]: numbers(1.0)})
    assert same(play(opt, params, [[None, numbers(0.0)]]), [numbers(0.0), numbers(-10.0)])


def test_feeding_what_no_rule_reads_is_refused() -> None:
    opt = optimizer(zeros((1,)), fed(), lr=1.0)
    with pytest.raises(ValueError, match=r"'targets'.*target"):
        opt.feed(targets=[numbers(1.0)])
    with pytest.raises(ValueError, match="'q'"):
        opt.feed(target={"q": numbers(1.0)})
    with pytest.raises(ValueError, match="2 tensors for 1"):
        opt.feed(target=[numbers(1.0), numbers(1.0)])


def test_a_fed_tensor_of_another_shape_is_refused_by_name() -> None:
    """Compiled kernels read it as they read the weights: they would run over its end."""
    (p,) = zeros((4,))
    opt = optimizer([("w", p)], fed(), lr=1.0)
    with pytest.raises(ValueError, match=r"'w'.*\(1,\).*\(4,\)|'w'.*\(4,\).*\(1,\)"):
        opt.feed(target=[numbers(1.0)])


@pytest.mark.parametrize("kind", [apply_matrix, apply_tensor])
def test_a_rule_may_say_another_shape_for_what_it_is_fed_and_sees_it_as_it_is(kind: type[apply]) -> None:
    def measure(self: Any, u: Tensor, state: State, x: Tensor, k: Context) -> dict[str, Tensor]:
        return {"seen": k.target.sum()}

    said = {"measure": measure, "fed_shapes": lambda self, p: {"target": (p.shape[0], 2)}}
    shaped = type(kind.__name__, (kind,), said)
    params = zeros((3, 4), (2, 2, 3))
    opt = optimizer(params, shaped(lambda u, state, x, k: k.target.T.sum() * u + k.total["seen"], feeds=("target",)), lr=1.0)
    targets = [ramp(3, 2), ramp(2, 2)]
    assert "2, 2, 3" in str(opt.plan()) or "2x2x3" in str(opt.plan())
    opt.feed(target=targets)
    both = targets[0].sum() + targets[1].sum()
    found = play(opt, params, [[ramp(3, 4), ramp(2, 2, 3)]])
    expected = [-(t.sum() * g + both) for t, g in zip(targets, (ramp(3, 4), ramp(2, 2, 3)), strict=True)]
    assert distance(found, expected) < 1e-12
    with pytest.raises(ValueError, match=r"is to be fed shape \(3, 2\), its tensor \(3, 4\)"):
        opt.feed(target={params[0]: ramp(3, 4)})


def test_rules_that_see_pieces_are_fed_what_has_the_parameters_shape() -> None:
    rule = type("apply", (apply,), {"fed_shapes": lambda self, p: {"target": (2, 2)}})(feeds=("target",))
    with pytest.raises(ValueError, match="of unit 'element'"):
        optimizer(zeros((4,)), rule, lr=1.0)


def may_be_fed(kind: type[apply] = apply, **more: Any) -> apply:
    return kind(lambda u, state, x, k: u if k.target is None else u + 10 * k.target, may_feed=("target",), **more)


@pytest.mark.parametrize("kind", [apply, apply_matrix, apply_tensor])
def test_what_may_be_fed_is_none_for_a_parameter_that_got_nothing(kind: type[apply]) -> None:
    params = zeros((2, 2), (2, 2))
    opt = optimizer(params, may_be_fed(kind), lr=1.0)
    g, target = ramp(2, 2), ramp(2, 2).flip(0)
    found = play(opt, params, [[g, g]])
    assert same(found, [-g, -g])
    opt.feed(target={params[1]: target})
    found = play(opt, params, [[g, g]])
    assert same(found, [-2 * g, -(2 * g + 10 * target)])
    assert same(play(opt, params, [[g, g]]), [-3 * g, -(3 * g + 10 * target)]), "one step uses it up"


@pytest.mark.parametrize("backend", ["tiles", "chunks", "auto"])
def test_what_may_be_fed_compiles_twice_at_most_and_means_the_same_everywhere(backend: str) -> None:
    rule = may_be_fed()
    start, grads = draw([(64, 128), (64,)], 5, dtype=torch.float32)
    params, twins = leaves(start), leaves(start)
    opt, eager = optimizer(params, rule, lr=0.1, backend=backend), optimizer(twins, rule, lr=0.1)
    for t, row in enumerate(grads):
        for one, tensors in ((opt, params), (eager, twins)):
            if t != 1:
                one.feed(target={tensors[i]: start[i] for i in range(2) if (t + i) % 2 == 0})
            play(one, tensors, [row])
    assert distance(params, twins) < 1e-6


def test_passes_that_were_fed_other_tensors_wait_for_common_totals_without_disturbing_each_other() -> None:
    class share(apply_tensor):
        reads = "update"

        def measure(self, u: Tensor, state: State, x: Tensor, k: Context) -> dict[str, Tensor]:
            return {"sum": u.sum()}

    rule = chain(may_be_fed(), share(lambda u, state, x, k: u / k.total["sum"]), gain(1.0))
    params = zeros((2,), (2,))
    opt = optimizer(params, rule, lr=1.0)
    opt.feed(target={params[0]: numbers(1.0, 1.0)})
    found = play(opt, params, [[numbers(1.0, 2.0), numbers(3.0, 4.0)]])
    assert distance(found, [-numbers(11.0, 12.0) / 30, -numbers(3.0, 4.0) / 30]) < 1e-15


def test_a_rule_for_whole_layers_may_not_be_fed_only_sometimes() -> None:
    class joint(apply):
        unit = "layer"

    model = torch.nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"'target'.*feeds"):
        optimizer(model, may_be_fed(joint), lr=1.0)


# -- the step itself -------------------------------------------------------------------------------------------------------


def test_a_rule_that_owns_the_step_returns_the_displacement_itself() -> None:
    params = leaves([numbers(1.0, 2.0)])
    opt = optimizer(params, chain(gain(2.0), apply(owns_step=True)), lr=0.1, weight_decay=0.5)
    assert same(play(opt, params, [[numbers(1.0, -1.0)]]), [numbers(3.0, 0.0)])


def test_a_chain_that_ends_with_a_matrix_rule_of_its_own_step_is_refused() -> None:
    with pytest.raises(ValueError, match="element"):
        optimizer(zeros((2, 2)), apply_matrix(owns_step=True), lr=1.0)


def test_slots_of_an_element_rule_have_the_shape_of_the_parameter() -> None:
    """It sees flat pieces: a slot of another shape cannot be cut like them."""
    with pytest.raises(ValueError, match="norm"):
        optimizer(zeros((8,)), apply(slots={"norm": Slot(())}), lr=1.0)


def test_a_rule_without_update_says_so() -> None:
    class nothing(Transform):
        pass

    params = zeros((1,))
    with pytest.raises(NotImplementedError, match=r"nothing\.update"):
        play(optimizer(params, nothing(), lr=1.0), params, [[numbers(1.0)]])
