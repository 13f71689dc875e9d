"""The optimizer around a rule: its settings, its groups, looking ahead and going back."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conformance.problems import Grads, distance, draw, leaves, play, same
from optim.toys import apply, apply_layer, apply_matrix, gain, heavy, numbers, optimizer, zeros
from torch import Tensor, nn

from poise.optim import SGD, AdamW, Context, Lion, Muon, Optimizer, Param, Route, Slot, Transform, by_name, chain, everything
from poise.optim.rules.lion import lion
from poise.optim.transform import State
from poise.optim.transforms.clipping import clip

# -- settings ------------------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"lr": -0.1}, r"lr=-0\.1"),
    ({"lr": float("nan")}, "lr=nan"),
    ({"lr": torch.tensor(-1.0)}, "lr=-1"),
    ({"weight_decay": -0.1}, r"weight_decay=-0\.1"),
    ({"decay": "coupeld"}, r"'coupeld'.*'coupled'"),
    ({"weights": "stochastical"}, r"'stochastical'.*stochastic"),
    ({"scale": "RMS"}, r"'RMS'.*rms"),
    ({"backend": "cuda"}, r"'cuda'.*tiles"),
    ({"state": "int7"}, r"'int7'.*int8|int7"),
    ({"state": {"embeding": "fp32", "*": "bf16"}}, r"'embeding'.*embedding"),
    ({"seed": 1.5}, r"seed=1\.5"),
]


@pytest.mark.parametrize(("setting", "message"), WRONG, ids=[f"{n}={v}" for s, _ in WRONG for n, v in s.items()])
def test_a_setting_that_cannot_work_is_refused_with_what_is_allowed(setting: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        optimizer(leaves([torch.zeros(3)], torch.bfloat16), lion(), **{"lr": 0.1, **setting})


def test_an_unknown_option_is_refused_with_the_known_ones() -> None:
    with pytest.raises(TypeError, match=r"'stat'.*state"):
        optimizer(zeros((3,)), heavy(), lr=0.1, stat="int8")
    misspelt: dict[str, Any] = {"betaz": (0.9, 0.99)}
    with pytest.raises(TypeError, match=r"Lion.*'betaz'"):
        Lion(zeros((3,)), **misspelt)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"gian": 3.0}, r"'gian'.*gain"), ({"lr": -1.0}, "lr=-1"), ({"weight_decay": -1.0}, "weight_decay=-1")],
)
def test_a_group_option_that_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimizer([{"params": zeros((3,)), **options}], gain(), lr=0.1)
    opt = optimizer(zeros((3,)), gain(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        opt.add_param_group({"params": zeros((2,)), **options})


def test_an_optimizer_without_a_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="route"):
        optimizer(zeros((3,)), [], lr=0.1)


@pytest.mark.parametrize("options", [{"gian": 3.0}, {"lr": -1.0}, {}], ids=["unknown", "negative", "no matrix"])
def test_a_constructor_that_fails_leaves_the_callers_groups_and_parameters_as_they_were(options: dict[str, Any]) -> None:
    params = zeros((3, 3), (3,))
    groups: list[dict[str, Any]] = [{"params": params[:1], "lr": 0.5}, {"params": params[1:], **options}]
    before = copy.copy(groups), [dict(group) for group in groups], [list(group["params"]) for group in groups]
    with pytest.raises(ValueError, match=r"gian|lr=-1|matrix rule"):
        optimizer(groups, chain(apply_matrix(), gain()), lr=0.1)
    assert groups == before[0]
    assert [dict(group) for group in groups] == before[1]
    assert all(
        a is b for group, held in zip(groups, before[2], strict=True) for a, b in zip(group["params"], held, strict=True)
    )
    assert all(p.grad is None for p in params)


def test_a_constructor_that_works_does_not_write_into_the_callers_groups_either() -> None:
    groups: list[dict[str, Any]] = [{"params": zeros((3,)), "lr": 0.5}]
    opt = optimizer(groups, gain(), lr=0.1)
    play(opt, groups[0]["params"], [[numbers(1.0, 2.0, 3.0)]])
    assert groups[0].keys() == {"params", "lr"}


@pytest.mark.parametrize("shape", [(3,), ()])
def test_a_matrix_rule_that_gets_a_vector_says_which_and_what_to_do(shape: tuple[int, ...]) -> None:
    (w, v) = zeros((3, 3), shape)
    with pytest.raises(ValueError, match=r"'gamma'.*two dimensions.*[Rr]oute"):
        optimizer([("w", w), ("gamma", v)], apply_matrix(), lr=0.1)


def test_a_group_that_cannot_be_added_is_not() -> None:
    params = zeros((3, 3))
    opt = optimizer(params, chain(apply_matrix(), heavy()), lr=1.0)
    state = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match="matrix rule"):
        opt.add_param_group({"params": zeros((4,))})
    assert len(opt.param_groups) == 1
    assert opt.state_dict()["param_groups"] == state["param_groups"]
    added = zeros((2, 2))
    opt.add_param_group({"params": added, "lr": 2.0})
    found = play(opt, [*params, *added], [[torch.ones(3, 3), torch.ones(2, 2)]])
    assert same(found, [-torch.ones(3, 3).double(), -2 * torch.ones(2, 2).double()])


def test_a_tensor_as_learning_rate_may_be_changed_in_place() -> None:
    lr = torch.tensor(0.5)
    params = zeros((2,))
    opt = optimizer(params, apply(), lr=lr)
    play(opt, params, [[numbers(1.0, 2.0)]])
    lr.fill_(0.25)
    assert same(play(opt, params, [[numbers(1.0, 2.0)]]), [numbers(-0.75, -1.5)])


# -- decay ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "wanted"),
    [
        ("coupled", lambda x, g, lr, initial: x - lr * g - lr * 0.5 * x),
        ("independent", lambda x, g, lr, initial: x - lr * g - lr / initial * 0.5 * x),
        ("after", lambda x, g, lr, initial: (x - lr * g) * (1 - lr * 0.5)),
        ("l2", lambda x, g, lr, initial: x - lr * (g + 0.5 * x)),
    ],
)
def test_decay_under_a_schedule(mode: Any, wanted: Callable[..., Tensor]) -> None:
    """torch's schedulers write `initial_lr` into the groups; independent decay follows lr / initial_lr."""
    start, grads = draw([(4, 3)], 4)
    params = leaves(start)
    opt = optimizer(params, apply(), lr=0.2, weight_decay=0.5, decay=mode)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1.0 / (1 + t))
    x = start[0].clone()
    for t, row in enumerate(grads):
        assert row[0] is not None
        play(opt, params, [row])
        schedule.step()
        x = wanted(x, row[0], 0.2 / (1 + t), 0.2)
    assert distance(params, [x]) < 1e-14


def test_l2_decay_enters_before_the_rule_and_decoupled_decay_behind_it() -> None:
    params, twin = leaves([numbers(4.0)]), leaves([numbers(4.0)])
    half = apply(lambda u, state, x, k: torch.sign(u))
    zero: Grads = [[numbers(0.0)]]
    assert float(play(optimizer(params, half, lr=0.1, weight_decay=0.5, decay="l2"), params, zero)[0]) == 4.0 - 0.1
    assert float(play(optimizer(twin, half, lr=0.1, weight_decay=0.5), twin, zero)[0]) == pytest.approx(4.0 - 0.1 * 0.5 * 4)


def test_independent_decay_without_a_schedule_is_the_whole_decay() -> None:
    params = leaves([numbers(4.0)])
    opt = optimizer(params, apply(), lr=1e-6, weight_decay=0.5, decay="independent")
    assert float(play(opt, params, [[numbers(0.0)]])[0]) == 2.0


def test_vectors_are_spared_from_decay_on_request() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).double()
    start = [p.detach().clone() for p in model.parameters()]
    opt = optimizer(model, apply(), lr=0.1, weight_decay=0.5, decay_vectors=False)
    found = play(opt, list(model.parameters()), [[torch.zeros_like(w) for w in start]])
    assert distance(found, [start[0] * 0.95, *start[1:]]) < 1e-15


# -- one scale for all rules -----------------------------------------------------------------------------------------------


def rms_of_update(opt: Optimizer, grads: list[Tensor]) -> list[float]:
    return [float(u.double().square().mean().sqrt()) for u in opt.preview(grads).values()]


@pytest.mark.parametrize("shape", [(64, 64), (32, 96), (96, 32), (16, 4, 3, 3)])
def test_one_scale_gives_lion_and_muon_the_update_size_of_adamw(shape: tuple[int, ...]) -> None:
    (weights, gradient), _ = draw([shape, shape], 0, dtype=torch.float32)
    lion = Lion(leaves([weights]), lr=0.03, scale="rms", backend="eager")
    muon = Muon(leaves([weights]), lr=0.03, scale="rms", method="svd", backend="eager")
    assert rms_of_update(lion, [gradient])[0] == pytest.approx(0.2 * 0.03, rel=1e-5)
    assert rms_of_update(muon, [gradient])[0] == pytest.approx(0.2 * 0.03, rel=1e-4)


def test_one_scale_leaves_adamw_and_weight_decay_as_they_are() -> None:
    start, grads = draw(steps=3)
    plain, scaled = leaves(start), leaves(start)
    wanted = play(AdamW(plain, lr=0.03, weight_decay=0.1, backend="eager"), plain, grads)
    assert same(play(AdamW(scaled, lr=0.03, weight_decay=0.1, scale="rms", backend="eager"), scaled, grads), wanted)
    zero = leaves([numbers(2.0)])
    opt = Lion(zero, lr=0.5, weight_decay=0.5, scale="rms", backend="eager")
    assert same(play(opt, zero, [[numbers(0.0)]]), [numbers(1.5)])


def test_without_it_every_rule_keeps_its_papers_scale() -> None:
    (weights, gradient), _ = draw([(64, 64), (64, 64)], 0, dtype=torch.float32)
    assert rms_of_update(Lion(leaves([weights]), lr=0.03, backend="eager"), [gradient])[0] == pytest.approx(0.03, rel=1e-5)


def test_a_rule_as_large_as_its_gradient_cannot_be_given_one_scale() -> None:
    with pytest.raises(ValueError, match=r"scale='rms'"):
        SGD(zeros((3, 3)), lr=0.1, scale="rms")


# -- formats of state ------------------------------------------------------------------------------------------------------


def test_state_formats_may_differ_by_role() -> None:
    model = nn.Sequential(nn.Embedding(50, 128), nn.Linear(128, 64))
    opt = optimizer(model, heavy(), lr=0.1, state={"embedding": "bf16", "*": "int8"})
    table, matrix, bias = model.parameters()
    assert opt.state[table]["buffer"].dtype is torch.bfloat16
    assert {"buffer.codes", "buffer.scale"} <= set(opt.state[matrix])
    assert opt.state[bias]["buffer"].dtype is torch.float32


def test_roles_without_a_format_stay_in_full_precision() -> None:
    model = nn.Sequential(nn.Embedding(50, 128), nn.Linear(128, 64))
    opt = optimizer(model, heavy(), lr=0.1, state={"embedding": "bf16"})
    table, matrix, _ = model.parameters()
    assert opt.state[table]["buffer"].dtype is torch.bfloat16
    assert opt.state[matrix]["buffer"].dtype is torch.float32


def test_state_bytes_are_those_of_the_tensors_kept() -> None:
    class both(heavy):
        def slots(self, p: Param) -> dict[str, Slot]:
            return {"buffer": Slot(tuple(p.shape)), "largest": Slot((), shared=True)}

        def measure(self, u: Tensor, state: State, x: Tensor, k: Context) -> dict[str, Tensor]:
            return {"sum": u.sum()}

    assert optimizer(zeros((64, 128), (10,), dtype=torch.float32), both(), lr=0.1).state_bytes() == 4 * (64 * 128 + 10 + 1)
    assert optimizer(zeros((64, 128)), heavy(), lr=0.1).state_bytes() == 8 * 64 * 128
    assert optimizer(zeros((64, 128), dtype=torch.bfloat16), heavy(), lr=0.1).state_bytes() == 4 * 64 * 128
    assert optimizer(zeros((64, 128)), gain(), lr=0.1).state_bytes() == 0


# -- going back ------------------------------------------------------------------------------------------------------------


def thorough(params: Any, **options: Any) -> Optimizer:
    """Every kind of state at once: shared, encoded, refreshed, gathered, random."""

    class busy(Transform):
        every = 2

        def slots(self, p: Param) -> dict[str, Slot]:
            return {"held": Slot(tuple(p.shape)), "count": Slot(tuple(p.shape), kind="exact"), "total": Slot((), shared=True)}

        def refresh(self, u: Tensor, state: State, x: Tensor, k: Context) -> None:
            state["held"] = u * k.step

        def measure(self, u: Tensor, state: State, x: Tensor, k: Context) -> dict[str, Tensor]:
            state["count"] = state["count"] + 1
            return {"sum": u.double().sum()}

        def reduce(self, totals: dict[str, Tensor], shared: State, k: Context) -> dict[str, Tensor]:
            shared["total"] = shared["total"] + totals["sum"] * k.clock
            return {"total": shared["total"]}

        def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
            return u + 0.1 * state["held"] + 0.01 * state["count"] + 0.001 * k.total["total"] + 0.1 * k.uniform()

    return optimizer(params, chain(clip(2.0), busy(), heavy()), **{"lr": 0.1, "weight_decay": 0.1, "state": "int8", **options})


def everything_in(opt: Optimizer, params: list[Any]) -> dict[str, Tensor]:
    held = {f"{i}/{key}": value.clone() for i, p in enumerate(params) for key, value in opt.state[p].items()}
    clocks = {f"clock {i}": torch.tensor(group["clock"]) for i, group in enumerate(opt.param_groups)}
    return held | clocks | {f"weight {i}": p.detach().clone() for i, p in enumerate(params)}


def unchanged(now: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    assert now.keys() == before.keys()
    for name, value in before.items():
        assert now[name].dtype is value.dtype and torch.equal(now[name], value), name


DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_restoring_a_snapshot_brings_back_weights_state_and_counts_bit_for_bit(dtype: torch.dtype) -> None:
    start, grads = draw([(64, 128), (5,)], 6, dtype=dtype, missing=[(3, 1)])
    params = leaves(start)
    opt = thorough(params)
    play(opt, params, grads[:2])
    before = everything_in(opt, params)
    taken = opt.snapshot()
    wanted = play(opt, params, grads[2:])
    for _ in range(2):  # more than once: what was taken is a copy
        opt.restore(taken)
        unchanged(everything_in(opt, params), before)
        assert same(play(opt, params, grads[2:]), wanted)


def test_a_snapshot_of_weights_alone_leaves_the_state_where_it_is_and_the_other_way_round() -> None:
    start, grads = draw([(64, 128), (5,)], 4, dtype=torch.float32)
    params = leaves(start)
    opt = thorough(params)
    play(opt, params, grads[:2])
    weights, state = opt.snapshot(state=False), opt.snapshot(params=False)
    before = everything_in(opt, params)
    play(opt, params, grads[2:])
    later = everything_in(opt, params)
    opt.restore(weights)
    unchanged(everything_in(opt, params), later | {k: v for k, v in before.items() if k.startswith("weight")})
    opt.restore(state)
    unchanged(everything_in(opt, params), before)


def test_a_snapshot_of_other_parameters_is_refused() -> None:
    taken = thorough(zeros((3,), (4,))).snapshot()
    with pytest.raises(ValueError, match=r"2 parameters.*has 1"):
        thorough(zeros((3,))).restore(taken)


# -- looking ahead -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", [True, False], ids=["given gradients", "its own gradients"])
def test_a_preview_changes_nothing(dtype: torch.dtype, given: bool) -> None:
    start, grads = draw([(64, 128), (5,), (3, 2)], 5, dtype=dtype)
    params, twin = leaves(start), leaves(start)
    opt, clean = thorough(params), thorough(twin)
    play(opt, params, grads[:2])
    params[2].grad = None
    before = everything_in(opt, params)
    held = [p.grad for p in params]
    values = [None if g is None else g.clone() for g in held]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups]
    opt.preview({params[0]: grads[2][0], params[1]: grads[2][1]} if given else None)  # pyright: ignore[reportArgumentType]
    unchanged(everything_in(opt, params), before)
    assert all(p.grad is g for p, g in zip(params, held, strict=True))
    assert all(g is None or torch.equal(g, v) for g, v in zip(held, values, strict=True) if v is not None)
    assert [{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups] == groups
    assert same(play(opt, params, grads[2:]), play(clean, twin, grads))


def test_a_preview_is_the_displacement_of_the_next_step() -> None:
    start, grads = draw([(64, 128), (5,)], 4)
    params = leaves(start)
    opt = thorough(params)
    play(opt, params, grads[:3])
    before = [p.detach().clone() for p in params]
    foreseen = opt.preview(grads[3])  # pyright: ignore[reportArgumentType]
    after = play(opt, params, grads[3:])
    assert list(foreseen) == ["param_0", "param_1"]
    assert distance(list(foreseen.values()), [a - b for a, b in zip(after, before, strict=True)]) < 1e-14


def test_a_preview_of_bfloat16_weights_is_the_displacement_before_rounding() -> None:
    params = leaves([torch.ones(4)], torch.bfloat16)
    found = optimizer(params, apply(), lr=1e-5).preview([torch.ones(4)])["param_0"]
    assert found.dtype is torch.float32
    assert torch.equal(found, torch.full((4,), -1e-5))


def test_a_preview_leaves_out_what_has_no_gradient_and_goes_by_name() -> None:
    (v, w) = zeros((2,), (3,))
    opt = optimizer([("v", v), ("w", w)], apply(), lr=1.0)
    assert opt.preview() == {}
    found = opt.preview({"w": numbers(1.0, 2.0, 3.0)})
    assert found.keys() == {"w"}
    assert torch.equal(found["w"], numbers(-1.0, -2.0, -3.0))
    with pytest.raises(ValueError, match="'u'"):
        opt.preview({"u": numbers(1.0)})


def test_a_preview_does_not_use_up_what_was_fed() -> None:
    params = zeros((2,))
    opt = optimizer(params, apply(lambda u, state, x, k: u + k.target, feeds=("target",)), lr=1.0)
    opt.feed(target=[numbers(10.0, 20.0)])
    assert torch.equal(opt.preview([numbers(1.0, 2.0)])["param_0"], numbers(-11.0, -22.0))
    assert same(play(opt, params, [[numbers(0.0, 0.0)]]), [numbers(-10.0, -20.0)])


def test_a_preview_that_fails_puts_everything_back() -> None:
    def fail(u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        raise FloatingPointError("too far")

    start, grads = draw([(4,), (3,)], 1)
    params = leaves(start)
    routes = [Route("a", chain(heavy()), by_name("a")), Route("b", chain(apply(fail)), everything)]
    opt = optimizer([("a", params[0]), ("b", params[1])], routes, lr=1.0)
    before = everything_in(opt, params)
    with pytest.raises(FloatingPointError):
        opt.preview(grads[0])  # pyright: ignore[reportArgumentType]
    unchanged(everything_in(opt, params), before)
    assert all(p.grad is None for p in params)


@pytest.mark.parametrize("backend", ["eager", "chunks"])
def test_a_rule_that_returns_the_gradient_itself_does_not_hand_it_out_to_be_written_to(backend: Any) -> None:
    """Neither by a preview, nor by a step whose later stretches work in place."""
    (p,) = params = zeros((3, 3), dtype=torch.float32)
    opt = Optimizer(params, chain(apply_matrix(), gain(2.0), apply_matrix(), gain(2.0)), lr=1.0, backend=backend)
    p.grad = torch.ones(3, 3)
    opt.preview()
    assert torch.equal(p.grad, torch.ones(3, 3))
    opt.step()
    assert torch.equal(p.grad, torch.ones(3, 3))
    assert torch.equal(p.detach(), torch.full((3, 3), -4.0))


# -- parameters that change under it ------------------------------------------------------------------------------------------


def test_a_model_that_becomes_bfloat16_is_trained_on_with_its_state() -> None:
    """As if the weights had been bfloat16 from there on: state stays float32, and what it remembers is not lost."""
    torch.manual_seed(0)
    model = nn.Linear(64, 66)
    opt = optimizer(model, heavy(), lr=1e-3)
    _, grads = draw([(66, 64), (66,)], 4, dtype=torch.float32)
    play(opt, list(model.parameters()), grads[:2])
    kept = {key: value.clone() for key, value in opt.state[model.weight].items()}
    model.to(torch.bfloat16)
    low = [[g.bfloat16() for g in row if g is not None] for row in grads]
    play(opt, list(model.parameters()), [list(low[2])])
    buffer = opt.state[model.weight]["buffer"]
    assert buffer.dtype is torch.float32
    assert torch.equal(buffer, 0.5 * kept["buffer"] + low[2][0].float())
    assert int(opt.state[model.weight]["step"]) == 3
    assert model.weight.dtype is torch.bfloat16


def test_a_model_that_becomes_float64_has_float64_state() -> None:
    """Rules compute in float64 then; compiled kernels would read float32 state as if it were."""
    model = nn.Linear(3, 4)
    opt = optimizer(model, heavy(), lr=1e-3)
    _, grads = draw([(4, 3), (4,)], 3)
    play(opt, list(model.parameters()), grads[:2])
    kept = opt.state[model.weight]["buffer"].clone()
    model.double()
    play(opt, list(model.parameters()), grads[2:])
    assert grads[2][0] is not None
    assert same([opt.state[model.weight]["buffer"]], [0.5 * kept.double() + grads[2][0]])


def test_a_model_that_becomes_bfloat16_gets_the_state_that_split_weights_need() -> None:
    model = nn.Linear(3, 4)
    opt = optimizer(model, heavy(), lr=1e-3, weights="split")
    _, grads = draw([(4, 3), (4,)], 3)
    play(opt, list(model.parameters()), grads[:1])
    model.to(torch.bfloat16)
    play(opt, list(model.parameters()), grads[1:])
    assert opt.state[model.weight]["weight.low"].dtype is torch.int16


def test_a_parameter_that_changes_its_shape_is_refused_by_name() -> None:
    """Kernels know where it ends from its first shape."""
    (p,) = params = zeros((6,))
    opt = optimizer([("w", p)], heavy(), lr=1.0)
    play(opt, params, [[torch.ones(6)]])
    p.grad = None
    p.data = torch.zeros(4, dtype=torch.float64)
    p.grad = torch.ones(4, dtype=torch.float64)
    with pytest.raises((ValueError, RuntimeError), match=r"'w'.*\(4,\).*\(6,\)|'w'.*\(6,\).*\(4,\)"):
        opt.step()


def test_a_gradient_in_a_wider_dtype_is_not_needed() -> None:
    """The update of a bfloat16 weight is computed in float32 from its bfloat16 gradient."""
    params = leaves([torch.zeros(4)], torch.bfloat16)
    gradient = torch.tensor([1.0, 1 / 3, -2.5, 1e-3]).bfloat16()
    opt = optimizer(params, heavy(), lr=1.0, weights="nearest")
    play(opt, params, [[gradient]])
    assert torch.equal(opt.state[params[0]]["buffer"], gradient.float())
    assert math.isclose(float(params[0].detach()[1]), -float(gradient[1]))


def test_the_whole_rule_of_a_group_is_known() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    opt = Muon(model, decay="after", backend="eager")
    rules = {group["rule"]: opt.rule_of(group) for group in opt.param_groups}
    assert len(rules) > 1 and len({id(rule) for rule in rules.values()}) == len(rules)
    for rule in rules.values():
        assert [repr(link) for link in rule][-2:] == ["scale_by_lr()", "decay('after')"]


# -- state of some parameters only ---------------------------------------------------------------------------------------


def test_kept_parameters_train_as_ever_and_the_others_stand_still_without_state() -> None:
    start, grads = draw([(6, 4), (4,), (3, 5)], 6)
    params, twins = leaves(start), leaves(start)
    opt, twin = AdamW(params, lr=0.1, backend="eager"), AdamW(twins, lr=0.1, backend="eager")
    play(opt, params, grads[:2])
    wanted = play(twin, twins, grads[:2])
    opt.keep_only([params[0], params[2]])
    assert params[1] not in opt.state
    assert opt.state_bytes() == 8 * 2 * (24 + 15)
    found = play(opt, params, grads[2:4])
    assert torch.equal(found[1], wanted[1])
    wanted = play(twin, twins, grads[2:4])
    assert same([found[0], found[2]], [wanted[0], wanted[2]])
    opt.keep_only(None)
    assert [int(opt.state[p]["step"]) for p in params] == [4, 0, 4]
    assert float(opt.state[params[1]]["exp_avg_sq"].abs().max()) == 0.0


def test_a_snapshot_knows_whose_state_was_kept_and_a_copy_and_a_plan_do_too() -> None:
    start, grads = draw([(6, 4), (4,)], 6)
    params = leaves(start)
    opt = AdamW(params, lr=0.1, backend="eager")
    opt.keep_only(params[:1])
    play(opt, params, grads[:2])
    assert [line.shape for line in opt.plan()] == [(6, 4)]
    taken, (copied, twin) = opt.snapshot(), copy.deepcopy((params, opt))
    wanted = play(opt, params, grads[2:])
    assert same(play(twin, copied, grads[2:]), wanted)
    opt.keep_only(params[1:])
    opt.restore(taken)
    assert same(play(opt, params, grads[2:]), wanted)


def test_a_state_is_loaded_where_the_same_parameters_are_kept() -> None:
    start, grads = draw([(6, 4), (4,)], 4)
    params, fresh = leaves(start), leaves(start)
    opt, again = AdamW(params, lr=0.1, backend="eager"), AdamW(fresh, lr=0.1, backend="eager")
    opt.keep_only(params[1:])
    play(opt, params, grads[:2])
    saved = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match="no state for it"):
        again.load_state_dict(saved)
    again.keep_only(fresh[1:])
    again.load_state_dict(saved)
    again.restore({**again.snapshot(params=False), "params": opt.snapshot(state=False)["params"]})
    assert same(play(again, fresh, grads[2:]), play(opt, params, grads[2:]))


def test_only_parameters_of_the_optimizer_can_be_kept_and_layers_only_whole() -> None:
    model = torch.nn.Linear(3, 2)
    opt = AdamW(model)
    for wrong in ([], [torch.nn.Parameter(torch.zeros(2))]):
        with pytest.raises(ValueError, match="keep_only"):
            opt.keep_only(wrong)
    joint = Optimizer(model, apply_layer(), lr=0.1)
    with pytest.raises(ValueError, match=r"'(weight|bias)' without '(weight|bias)'"):
        joint.keep_only([model.weight])
