"""The surface people know: every entry is a `torch.optim.Optimizer` to schedulers, scalers, closures, hooks and copies."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from poise.catalog import Method

from .cases import batch, build, grads_like, loss_of, net, reference, tensors_of, told, tolerance
from .problems import SHAPES, distance, draw, leaves, play, same

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda t: 1 / (1 + t)),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=5),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(
        opt, [g["lr"] for g in opt.param_groups], total_steps=8, div_factor=1.0, cycle_momentum=False
    ),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, factor=0.5, patience=0),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
def test_a_scheduler_sets_the_learning_rate_of_each_step(entry: Method, scheduler: str, tensor: bool) -> None:
    start, grads = draw(steps=6)
    params = leaves(start)
    lr: Any = torch.tensor(0.01, dtype=torch.float64) if tensor else 0.01
    opt = build(entry, params, lr=lr, backend="eager")
    schedule = SCHEDULERS[scheduler](opt)
    rates = []
    for row in grads:
        rates.append(float(opt.param_groups[0]["lr"]))
        for p, g in zip(params, row, strict=True):
            p.grad = g
        opt.step()
        schedule.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
    assert len(set(rates)) > 2, "a schedule that never changes would prove nothing"
    assert distance(params, reference(entry)(start, grads, lr=rates, **told(entry, "TYPICAL", {}))) < tolerance(entry)


def test_hyper_parameters_changed_in_a_group_take_effect(entry: Method) -> None:
    """OneCycleLR cycles momentum and betas in this way."""
    start, grads = draw(steps=3)
    typical = told(entry, "TYPICAL", {})
    sample = build(entry, leaves(start), backend="eager")
    changed = 0
    for name, parameter in inspect.signature(entry.target).parameters.items():
        value = typical.get(name, parameter.default)
        if name == "lr":
            continue
        if isinstance(value, float):
            other: Any = 0.7 * value + 0.01
        elif isinstance(value, tuple) and all(isinstance(v, float) for v in value):
            other = tuple(0.7 * v for v in value)
        else:
            continue
        built, told_later = leaves(start), leaves(start)
        wanted_opt, opt = build(entry, built, backend="eager", **{name: other}), build(entry, told_later, backend="eager")
        before = changed
        for group, usual, wished in zip(opt.param_groups, sample.param_groups, wanted_opt.param_groups, strict=True):
            keys = [key for key in wished if key != "params" and wished[key] != usual[key]]
            group.update({key: wished[key] for key in keys})
            changed += len(keys)
        if changed == before and entry.kind == "transform":
            continue  # a setting of the link, not of a group
        assert distance(play(opt, told_later, grads), play(wanted_opt, built, grads)) < 1e-12, name
    assert changed or entry.kind == "transform"


def test_a_scheduler_that_cycles_momentum_finds_it_under_torchs_names(entry: Method) -> None:
    """OneCycleLR does so by default, and looks into `optimizer.defaults` for `betas` or `momentum`."""
    start, grads = draw(steps=5)
    cycled, by_hand = leaves(start), leaves(start)
    opt, twin = build(entry, cycled, backend="eager"), build(entry, by_hand, backend="eager")
    keys = {key for group in opt.param_groups for key in ("betas", "momentum") if key in group}
    schedule = lr_scheduler.OneCycleLR(opt, 0.02, total_steps=8, cycle_momentum=bool(keys))
    seen = set()
    for row in grads:
        for group, twins in zip(opt.param_groups, twin.param_groups, strict=True):
            twins.update({key: group[key] for key in ("lr", *keys) if key in group})
            seen.update(group[key] for key in keys if key in group)
        play(twin, by_hand, [row])
        play(opt, cycled, [row])
        schedule.step()
    assert distance(cycled, by_hand) < 1e-12
    assert not keys or len(seen) >= 4  # of five steps; the cycle passes one value on its way down and up


def test_a_closure_is_called_with_gradients_on_and_its_loss_returned(entry: Method) -> None:
    model, twin, data = net(), net(), batch()
    opt, twin_opt = build(entry, model, backend="eager"), build(entry, twin, backend="eager")

    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = loss_of(model, data)
        loss.backward()
        return loss

    for _ in range(3):
        twin_opt.zero_grad()
        wanted = loss_of(twin, data)
        wanted.backward()
        assert twin_opt.step() is None
        with torch.no_grad():
            assert torch.equal(opt.step(closure), wanted)  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert same(list(model.parameters()), list(twin.parameters()))


def test_a_gradient_scaler_changes_nothing_and_skips_what_overflowed(entry: Method) -> None:
    plain, scaled, data = net(), net(), batch()
    opt, scaled_opt = build(entry, plain, backend="eager"), build(entry, scaled, backend="eager")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        scaled_opt.zero_grad()
        scaler.scale(loss_of(scaled, data)).backward()
        before = [p.detach().clone() for p in scaled.parameters()]
        if step == 1:
            next(g for p in scaled.parameters() if (g := p.grad) is not None)[0, 0] = float("inf")
        scaler.step(scaled_opt)
        scaler.update()
        if step == 1:
            assert same(list(scaled.parameters()), before)
            continue
        opt.zero_grad()
        loss_of(plain, data).backward()
        opt.step()
    assert scaler.get_scale() == 2.0**9
    assert distance(list(scaled.parameters()), list(plain.parameters())) < 1e-6


def test_a_group_added_later_trains_as_if_its_gradients_had_been_missing(entry: Method) -> None:
    start, grads = draw(steps=5, dtype=torch.float32, missing=[(t, i) for t in (0, 1) for i in (2, 3)])
    early, late = leaves(start), leaves(start)
    wanted = play(build(entry, early, backend="eager"), early, grads)
    opt = build(entry, late[:2], backend="eager")
    play(opt, late[:2], [row[:2] for row in grads[:2]])
    opt.add_param_group({"params": late[2:]})
    assert sum(len(group["params"]) for group in opt.param_groups) == 4
    assert same(play(opt, late, grads[2:]), wanted)


def test_a_group_of_its_own_keeps_its_own_learning_rate(entry: Method) -> None:
    start, grads = draw([(64, 128), (64, 128)], 3, dtype=torch.float32)
    params = leaves(start)
    opt = build(entry, [{"params": params[:1]}, {"params": params[1:], "lr": 0.0}], backend="eager", weight_decay=0.1)
    found = play(opt, params, grads)
    assert torch.equal(found[1], start[1])
    assert not torch.equal(found[0], start[0])


@pytest.mark.parametrize(
    "dtype, backend, how",
    [(torch.float32, "eager", "deepcopy"), (torch.bfloat16, "auto", "pickle")],
    ids=["float32 eager-deepcopy", "bfloat16 compiled-pickle"],
)
def test_a_copy_made_in_mid_run_continues_identically(entry: Method, how: str, dtype: torch.dtype, backend: str) -> None:
    start, grads = draw(SHAPES[:2], 6, dtype=dtype)
    params = leaves(start)
    opt = build(entry, params, state="int8", backend=backend)
    play(opt, params, grads[:3])
    twin, twin_opt = copy.deepcopy((params, opt)) if how == "deepcopy" else pickle.loads(pickle.dumps((params, opt)))
    frozen = [p.detach().clone() for p in twin]
    wanted = play(opt, params, grads[3:])
    assert same(twin, frozen)
    assert same(play(twin_opt, twin, grads[3:]), wanted)
    assert same(list(tensors_of(twin_opt).values()), list(tensors_of(opt).values()))


def test_step_hooks_are_called_around_the_step_and_may_change_the_gradients(entry: Method) -> None:
    start, grads = draw(steps=2, dtype=torch.float32)
    params, halved = leaves(start), leaves(start)
    opt = build(entry, params, backend="eager")
    seen: list[str] = []

    def halve(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        seen.append("pre")
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad.mul_(0.5)

    opt.register_step_pre_hook(halve)
    opt.register_step_post_hook(lambda *_: seen.append("post"))
    found = play(opt, params, grads)
    assert seen == ["pre", "post"] * 2
    wanted = play(build(entry, halved, backend="eager"), halved, [[0.5 * g for g in row if g is not None] for row in grads])
    assert same(found, wanted)


def test_state_dict_hooks_are_called(entry: Method) -> None:
    start, _ = draw(dtype=torch.float32)
    opt = build(entry, leaves(start))
    seen: list[str] = []
    opt.register_state_dict_pre_hook(lambda _: seen.append("save pre"))
    opt.register_state_dict_post_hook(lambda _, state: {**state, "note": "kept"})
    opt.register_load_state_dict_pre_hook(lambda _, state: {k: v for k, v in state.items() if k != "note"})
    opt.register_load_state_dict_post_hook(lambda _: seen.append("load post"))
    saved = opt.state_dict()
    assert saved["note"] == "kept"
    opt.load_state_dict(saved)
    assert seen == ["save pre", "load post"]


def test_parameters_frozen_in_mid_run_stand_still_and_go_on_when_unfrozen(entry: Method) -> None:
    model, data = net(), batch()
    opt = build(entry, model, backend="eager")

    def step() -> None:
        opt.zero_grad()
        loss_of(model, data).backward()
        opt.step()

    step()
    frozen, _, trained, _ = model.parameters()
    frozen.requires_grad_(False)
    before, others = frozen.detach().clone(), trained.detach().clone()
    step()
    step()
    assert torch.equal(frozen, before)
    assert not torch.equal(trained, others)
    frozen.requires_grad_(True)
    step()
    assert not torch.equal(frozen, before)


def test_accumulated_gradients_make_one_step(entry: Method) -> None:
    model, twin, data = net(), net(), batch()
    opt, twin_opt = build(entry, model, backend="eager"), build(entry, twin, backend="eager")
    for _ in range(2):
        opt.zero_grad()
        twin_opt.zero_grad(set_to_none=False)
        before = [p.detach().clone() for p in model.parameters()]
        for half in (slice(0, 32), slice(32, 64)):
            (0.5 * loss_of(model, (data[0][half], data[1][half]))).backward()
        assert same(list(model.parameters()), before)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert p.grad is not None
            q.grad = p.grad.clone()
        opt.step()
        twin_opt.step()
    assert same(list(model.parameters()), list(twin.parameters()))


def test_autocast_around_the_step_changes_nothing(entry: Method) -> None:
    """Else the products inside a matrix rule would silently run in bfloat16."""
    start, grads = draw(steps=3, dtype=torch.float32)
    plain, cast = leaves(start), leaves(start)
    wanted = play(build(entry, plain, backend="eager"), plain, grads)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = play(build(entry, cast, backend="eager"), cast, grads)
    assert same(found, wanted)


def test_a_compiled_model_trains_as_the_plain_one(entry: Method) -> None:
    """torch.compile puts `_orig_mod.` before every name; seeds and roles must not depend on it."""
    ends = []
    for compiled in (False, True):
        model = net(dtype=torch.bfloat16)
        data = batch()
        seen = torch.compile(model, backend="eager") if compiled else model
        opt = build(entry, seen, backend="eager")
        for _ in range(3):
            opt.zero_grad()
            loss_of(lambda x, f=seen: f(x.bfloat16()), data).backward()
            opt.step()
        ends.append([p.detach() for p in model.parameters()])
    assert same(*ends)


def test_a_list_and_groups_of_the_same_parameters_train_alike(entry: Method) -> None:
    start, grads = draw(steps=3, dtype=torch.float32)
    bare, grouped = leaves(start), leaves(start)
    wanted = play(build(entry, bare, backend="eager"), bare, grads)
    opt = build(entry, [{"params": grouped[:1]}, {"params": grouped[1:]}], backend="eager")
    assert same(play(opt, grouped, grads), wanted)


def test_a_module_and_its_named_parameters_train_alike(entry: Method) -> None:
    ends = []
    for named in (False, True):
        model = net()
        opt = build(entry, model.named_parameters() if named else model, backend="eager")
        params = list(model.parameters())
        ends.append(play(opt, params, grads_like(params, 3)))
    assert distance(ends[0], list(net().parameters())) > 0
    assert [p.shape for p in ends[0]] == [p.shape for p in ends[1]]
