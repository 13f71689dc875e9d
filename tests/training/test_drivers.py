"""What holds for every driver: it is its formula, an ordinary torch.optim.Optimizer, and at home around any optimizer."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conformance.cases import build as build_rule
from conformance.cases import tensors_of
from conformance.problems import distance, same
from torch.optim import lr_scheduler
from training.cases import Task, bowl_task, build, classify, mutated, play, told, trained

from poise.catalog import Method
from poise.optim import SGD, AdamW, Muon
from poise.training import EMA, SAM, Driver

INNER: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "poise AdamW": lambda model: AdamW(model, lr=0.01, backend="eager"),
    "poise int8": lambda model: Muon(model, state="int8", backend="eager"),
    "torch AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
    "torch SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
}
inner = pytest.mark.parametrize("inner", INNER.values(), ids=INNER)


def gap(entry: Method, hyper: dict[str, Any], target: Callable[..., Any] | None = None, torchs: bool = False) -> float:
    """Largest difference to the reference, of the weights that are trained and of those to evaluate."""
    make = told(entry, "task", bowl_task)
    task = make()
    model: Any = task.model
    opt = torch.optim.SGD(model.parameters(), lr=0.1) if torchs else SGD(model, lr=0.1, backend="eager")
    driver = build(entry, opt, task, target=target, **hyper)
    found = play(driver, task, 12)
    with driver.evaluating():
        shown = trained(task)
    named = {"steps_" if name == "steps" else name: value for name, value in hyper.items()}
    wanted, shown_wanted = told(entry, "reference")(make().model, lr=0.1, steps=12, **named)
    return max(distance(found, wanted), distance(shown, shown_wanted))


@pytest.mark.parametrize("torchs", [False, True], ids=["poise", "torch"])
def test_it_equals_its_float64_reference(entry: Method, torchs: bool) -> None:
    for hyper in told(entry, "CASES"):
        assert gap(entry, hyper, torchs=torchs) < 1e-10, hyper


def test_its_reference_tells_it_from_its_mutant(entry: Method) -> None:
    wrong = mutated(entry)
    assert max(gap(entry, hyper, wrong) for hyper in told(entry, "CASES")) > 1e-4


def test_in_its_neutral_setting_it_is_any_rule_bit_for_bit(entry: Method, rule: Method) -> None:
    task, twin = classify(), classify()
    opt = build(entry, build_rule(rule, task.model, backend="eager"), task, **told(entry, "NEUTRAL"))
    assert same(play(opt, task, 3), play(build_rule(rule, twin.model, backend="eager"), twin, 3))


def test_around_any_rule_it_does_something_else_and_resumes_bit_for_bit(entry: Method, rule: Method) -> None:
    task, twin, plain = classify(), classify(), classify()
    opt = build(entry, build_rule(rule, task.model, backend="eager"), task)
    play(opt, task, 3)
    saved = (copy.deepcopy(task.model.state_dict()), copy.deepcopy(opt.state_dict()))
    wanted = play(opt, task, 3, 3)
    twin.model.load_state_dict(saved[0])
    again = build(entry, build_rule(rule, twin.model, backend="eager", lr=0.5), twin)
    again.load_state_dict(saved[1])
    assert same(play(again, twin, 3, 3), wanted)
    play(build_rule(rule, plain.model, backend="eager"), plain, 6)
    with opt.evaluating():
        assert all(bool(p.isfinite().all()) for p in trained(task))
        assert not same(trained(task), trained(plain))


@pytest.mark.parametrize("weights", ["auto", "split"])
def test_with_bfloat16_weights_it_resumes_bit_for_bit(entry: Method, weights: Any) -> None:
    task, twin = classify(dtype=torch.bfloat16), classify(dtype=torch.bfloat16)
    opt = build(entry, AdamW(task.model, lr=0.01, weights=weights, backend="eager"), task)
    play(opt, task, 3)
    model, saved = copy.deepcopy(task.model.state_dict()), copy.deepcopy(opt.state_dict())
    wanted = play(opt, task, 3, 3)
    twin.model.load_state_dict(model)
    again = build(entry, AdamW(twin.model, lr=0.01, weights=weights, backend="eager"), twin)
    again.load_state_dict(saved)
    assert same(play(again, twin, 3, 3), wanted)


@inner
def test_a_run_saved_to_disk_and_resumed_elsewhere_is_bitwise_the_uninterrupted_one(
    entry: Method, inner: Callable[[Any], torch.optim.Optimizer]
) -> None:
    task, twin = classify(), classify()
    opt = build(entry, inner(task.model), task)
    halfway = play(opt, task, 3)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    wanted = play(opt, task, 3, 3)
    for p, value in zip(twin.model.parameters(), halfway, strict=True):
        p.data.copy_(value)
    again = build(entry, inner(twin.model), twin)
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert same(play(again, twin, 3, 3), wanted)
    with opt.evaluating(), again.evaluating():
        assert same(trained(twin), trained(task))


def test_groups_state_and_defaults_are_the_inner_optimizers(entry: Method) -> None:
    task = classify()
    bare = AdamW(task.model)
    opt = build(entry, bare, task)
    assert isinstance(opt, torch.optim.Optimizer)
    assert opt.param_groups is bare.param_groups
    assert opt.state is bare.state
    assert opt.defaults is bare.defaults
    assert opt.base is bare
    opt.param_groups[0]["lr"] = 0.123
    assert bare.param_groups[0]["lr"] == 0.123


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda t: 1 / (1 + t)),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.02, total_steps=8),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_scheduler_sets_the_learning_rate_of_each_step(entry: Method, scheduler: str) -> None:
    task, twin = classify(), classify()
    opt, by_hand = (build(entry, AdamW(t.model, lr=0.01, backend="eager"), t) for t in (task, twin))
    schedule = SCHEDULERS[scheduler](opt)
    rates = []
    for step in range(5):
        rates.append(opt.param_groups[0]["lr"])
        for group, mine in zip(by_hand.param_groups, opt.param_groups, strict=True):
            group.update({key: mine[key] for key in ("lr", "betas")})
        play(opt, task, 1, step)
        play(by_hand, twin, 1, step)
        schedule.step()
    assert len(set(rates)) == 5
    assert same(trained(task), trained(twin))


def test_a_closure_is_called_with_gradients_on_and_its_loss_returned(entry: Method) -> None:
    task, twin = classify(), classify()
    opt = build(entry, AdamW(task.model), task)
    with torch.no_grad():
        found = opt.step(task.closure(opt))
    assert torch.equal(found.detach(), twin.loss(twin.model, 0).detach())


def test_without_a_closure_it_steps_on_the_gradients_that_are_there_or_says_why_it_cannot(entry: Method) -> None:
    task, twin = classify(), classify()
    opt, other = (build(entry, AdamW(t.model, backend="eager"), t) for t in (task, twin))
    if opt.needs_closure:
        with pytest.raises(TypeError, match=r"closure.*GradScaler"):
            opt.step()
        return
    for step in range(3):
        opt.zero_grad()
        task.loss(task.model, step).backward()
        assert opt.step() is None
    assert same(trained(task), play(other, twin, 3))


def test_a_gradient_scaler_skips_what_overflowed_around_drivers_that_need_no_closure(entry: Method) -> None:
    task = classify()
    opt = build(entry, AdamW(task.model), task)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(task.loss(task.model, 0)).backward()
    if opt.needs_closure:
        with pytest.raises(TypeError, match="GradScaler"):
            scaler.step(opt)
        return
    before, kept = trained(task), pickle.dumps(opt.state_dict()["drivers"])
    next(p for p in task.model.parameters()).grad[0, 0] = float("inf")  # pyright: ignore[reportOptionalSubscript]
    scaler.step(opt)
    assert same(trained(task), before)
    assert pickle.dumps(opt.state_dict()["drivers"]) == kept


def test_hooks_of_the_driver_run_around_the_whole_step_and_those_of_the_inner_one_inside(entry: Method) -> None:
    task = classify()
    bare = AdamW(task.model)
    opt = build(entry, bare, task)
    seen: list[str] = []
    for one, name in ((opt, "outer"), (bare, "inner")):
        one.register_step_pre_hook(lambda optimizer, *_, one=one, name=name: seen.append(f"{name} {optimizer is one}"))
        one.register_step_post_hook(lambda *_, name=name: seen.append(f"{name} done"))
    play(opt, task, 2)
    inside = ["inner True", "inner done"] * told(entry, "INNER_STEPS", 1)
    assert seen == ["outer True", *inside, "outer done"] * 2


def test_state_dict_hooks_are_called(entry: Method) -> None:
    task = classify()
    opt = build(entry, AdamW(task.model), task)
    seen: list[str] = []
    opt.register_state_dict_pre_hook(lambda _: seen.append("save pre"))
    opt.register_state_dict_post_hook(lambda _, state: {**state, "note": "kept"})
    opt.register_load_state_dict_pre_hook(lambda _, state: {k: v for k, v in state.items() if k != "note"})
    opt.register_load_state_dict_post_hook(lambda _: seen.append("load post"))
    saved = opt.state_dict()
    assert saved["note"] == "kept"
    opt.load_state_dict(saved)
    assert seen == ["save pre", "load post"]


@inner
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_made_in_mid_run_continues_identically(
    entry: Method, how: str, inner: Callable[[Any], torch.optim.Optimizer]
) -> None:
    if entry.name == "dnsam":
        how = "deepcopy"  # the task's own method is what it calls; it is copied with the task
    task = classify()
    opt = build(entry, inner(task.model), task)
    lr_scheduler.LambdaLR(opt, lambda t: 1.0)  # puts a wrapper of the old object over `step`, which must not be copied
    play(opt, task, 3)
    held = (task.model, opt)
    copied: Any = copy.deepcopy(held) if how == "deepcopy" else pickle.loads(pickle.dumps(held))
    model, twin_opt = copied
    twin = Task(model, task.loss, task.batches)
    if entry.name == "dnsam":
        twin_opt.full = twin.full
    frozen = trained(twin)
    wanted = play(opt, task, 3, 3)
    assert same(trained(twin), frozen)
    assert same(play(twin_opt, twin, 3, 3), wanted)


def missing_drivers(saved: dict[str, Any]) -> str:
    del saved["drivers"]
    return "none"


def other_driver(saved: dict[str, Any]) -> str:
    saved["drivers"][0]["driver"] = "Lookahead"
    return "Lookahead"


def too_many(saved: dict[str, Any]) -> str:
    saved["drivers"].append({"driver": "Lookahead"})
    return "Lookahead"


def missing_key(saved: dict[str, Any]) -> str:
    del saved["drivers"][0]["step"]
    return "'step'"


def unknown_key(saved: dict[str, Any]) -> str:
    saved["drivers"][0]["velocity"] = torch.zeros(3)
    return "velocity"


def wrong_kind(saved: dict[str, Any]) -> str:
    saved["drivers"][0]["step"] = "three"
    return "'three'"


@pytest.mark.parametrize("spoil", [missing_drivers, other_driver, too_many, missing_key, unknown_key, wrong_kind])
def test_a_state_that_does_not_fit_is_refused_by_name_and_changes_nothing(
    entry: Method, spoil: Callable[[dict[str, Any]], str]
) -> None:
    task, other = classify(), classify()
    opt = build(entry, AdamW(task.model, backend="eager"), task)
    giver = build(entry, AdamW(other.model, lr=0.3, backend="eager"), other)
    play(opt, task, 2)
    play(giver, other, 3)
    before, kept = tensors_of(opt), pickle.dumps(opt.own)
    saved = copy.deepcopy(giver.state_dict())
    named = spoil(saved)
    with pytest.raises(ValueError, match=re.escape(named)):
        opt.load_state_dict(saved)
    assert same(list(tensors_of(opt).values()), list(before.values()))
    assert pickle.dumps(opt.own) == kept
    assert all(group["lr"] != 0.3 for group in opt.param_groups)


@pytest.mark.parametrize("spoil", ["shape", "dtype", "length", "no tensor"])
def test_a_tensor_of_the_driver_that_does_not_fit_is_refused_by_place(spoil: str) -> None:
    task = classify()
    opt = EMA(AdamW(task.model, backend="eager"))
    saved = copy.deepcopy(opt.state_dict())
    kept: list[Any] = saved["drivers"][0]["weights"]
    spoilt = {"shape": torch.zeros(2, 2), "dtype": kept[1].double(), "no tensor": 3.0}
    if spoil == "length":
        kept.pop()
    else:
        kept[1] = spoilt[spoil]
    with pytest.raises(ValueError, match="EMA: 'weights'" + ("" if spoil == "length" else r"\[1\]")):
        opt.load_state_dict(saved)


def test_what_does_not_fit_the_inner_optimizer_leaves_the_driver_as_it_was() -> None:
    task, other = classify(), classify()
    opt, giver = EMA(AdamW(task.model)), EMA(AdamW(other.model))
    play(giver, other, 3)
    saved = copy.deepcopy(giver.state_dict())
    del saved["state"][2]["exp_avg"]
    kept = pickle.dumps(opt.own)
    with pytest.raises(ValueError, match="exp_avg"):
        opt.load_state_dict(saved)
    assert pickle.dumps(opt.own) == kept


def test_what_was_loaded_is_a_copy(entry: Method) -> None:
    task, other = classify(), classify()
    opt, giver = (build(entry, AdamW(t.model, backend="eager"), t) for t in (task, other))
    play(giver, other, 2)
    saved = copy.deepcopy(giver.state_dict())
    kept = pickle.dumps(saved["drivers"])
    opt.load_state_dict(saved)
    play(opt, task, 2)
    assert pickle.dumps(saved["drivers"]) == kept


@pytest.mark.parametrize("directly", [False, True], ids=["to the driver", "to the inner optimizer"])
@pytest.mark.parametrize("torchs", [False, True], ids=["poise", "torch"])
def test_a_group_added_later_is_driven_too(entry: Method, directly: bool, torchs: bool) -> None:
    task = classify()
    params = list(task.model.parameters())
    some: Any = [*params[:4]]
    bare = torch.optim.AdamW(some, lr=0.01) if torchs else AdamW(some, lr=0.01, backend="eager")
    opt = build(entry, bare, task)
    play(opt, task, 2)
    (bare if directly else opt).add_param_group({"params": params[4:], "lr": 0.02})
    before = trained(task)
    after = play(opt, task, 2, 2)
    assert [group["lr"] for group in opt.param_groups] == [0.01, 0.02]
    assert not same(after[4:5], before[4:5])
    assert not same(after[5:], before[5:])
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    with opt.evaluating():
        pass
    assert same(trained(task), after)


@inner
def test_a_snapshot_put_back_repeats_the_run_bit_for_bit(entry: Method, inner: Callable[[Any], torch.optim.Optimizer]) -> None:
    task = classify()
    opt = build(entry, inner(task.model), task)
    for steps in (0, 3):  # before the first step an optimizer of torch has no state
        play(opt, task, steps)
        taken = opt.snapshot()
        wanted = play(opt, task, 3, 3)
        opt.restore(taken)
        assert same(play(opt, task, 3, 3), wanted)
        opt.restore(taken)


def test_evaluating_gives_the_trainings_weights_back_bit_for_bit(entry: Method) -> None:
    task = classify(dtype=torch.bfloat16)
    opt = build(entry, AdamW(task.model), task)
    before = play(opt, task, 3)
    with opt.evaluating():
        shown = trained(task)
    assert same(trained(task), before)
    assert same(shown, before) == (not isinstance(opt, EMA))


def test_bytes_of_state_are_those_of_driver_and_inner_optimizer(entry: Method) -> None:
    task, twin = classify(), classify()
    kept = told(entry, "has_state", lambda model: list(model.parameters()))(twin.model)
    bare = AdamW(kept)
    opt = build(entry, AdamW(task.model), task)
    values = sum(p.numel() * 4 for p in task.model.parameters())
    shadow = values * told(entry, "KEPT", 1 if isinstance(opt, EMA) else getattr(opt, "delay", 0))
    assert opt.state_bytes() == bare.state_bytes() + shadow
    theirs = build(entry, torch.optim.AdamW(twin.model.parameters()), twin)
    play(theirs, twin, 2)
    if not theirs.needs_closure:
        assert theirs.state_bytes() == bare.state_bytes() + shadow + len(kept) * 4  # torch counts steps in float32


def test_zero_grad_clears_and_the_text_names_both(entry: Method) -> None:
    task = classify()
    opt = build(entry, AdamW(task.model), task)
    task.full()
    opt.zero_grad()
    assert all(p.grad is None for p in task.model.parameters())
    assert repr(opt).startswith(f"{type(opt).__name__} around AdamW")


def test_what_is_no_optimizer_is_refused(entry: Method) -> None:
    task = classify()
    wrong: Any = task.model
    wrong.param_groups = [{"params": list(task.model.parameters())}]
    with pytest.raises(TypeError, match=r"opt.*torch\.optim\.Optimizer"):
        build(entry, wrong, task)


def test_drivers_around_drivers_resume_bit_for_bit_and_are_told_apart() -> None:
    def nested(task: Task) -> Driver:
        return EMA(SAM(AdamW(task.model, lr=0.01, backend="eager"), rho=0.1), p=0.2)

    task, twin = classify(), classify()
    opt, again = nested(task), nested(twin)
    halfway = play(opt, task, 3)
    saved = copy.deepcopy(opt.state_dict())
    assert [one["driver"] for one in saved["drivers"]] == ["EMA", "SAM"]
    wanted = play(opt, task, 3, 3)
    for p, value in zip(twin.model.parameters(), halfway, strict=True):
        p.data.copy_(value)
    again.load_state_dict(saved)
    assert same(play(again, twin, 3, 3), wanted)
    assert same(again.own["weights"], opt.own["weights"])
    assert task.calls == 12
    with pytest.raises(ValueError, match=r"EMA, SAM.*SAM"):
        SAM(AdamW(twin.model)).load_state_dict(saved)


def test_evaluating_reaches_a_shadow_inside() -> None:
    task = classify()
    opt = SAM(EMA(AdamW(task.model), p=0.1))
    before = play(opt, task, 3)
    with opt.evaluating():
        assert not same(trained(task), before)


def test_a_hyper_parameter_of_the_driver_stands_in_every_group_and_is_saved_with_it() -> None:
    task = classify()
    params = list(task.model.parameters())
    opt = SAM(SGD([{"params": params[:2]}, {"params": params[2:4]}]), rho=0.2)
    assert [group["rho"] for group in opt.param_groups] == [0.2, 0.2]
    opt.add_param_group({"params": params[4:], "rho": 0.5})
    assert [group["rho"] for group in opt.param_groups] == [0.2, 0.2, 0.5]
    opt.param_groups[0]["rho"] = 0.1
    saved = copy.deepcopy(opt.state_dict())
    opt.param_groups[0]["rho"] = 0.9
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["rho"] == 0.1


def test_a_name_that_the_inner_optimizer_uses_gets_the_drivers_own_before_it_and_twice_is_refused() -> None:
    task = classify()
    once = Driver(SGD(task.model, momentum=0.9), {"momentum": 0.1})
    group = once.param_groups[0]
    assert (group["momentum"], group["driver_momentum"], once.hyper(group, "momentum")) == (0.9, 0.1, 0.1)
    with pytest.raises(ValueError, match="'driver_momentum'"):
        Driver(once, {"momentum": 0.2})


def test_the_example_of_the_contract_is_a_driver() -> None:
    """The class in the docstring of `Driver`, as it stands there."""
    text = Driver.__doc__ or ""
    lines = text[text.index("class Lookahead") :].splitlines()
    end = next(i for i, line in enumerate(lines) if i and not line.strip())
    names: dict[str, Any] = {"Driver": Driver}
    exec("\n".join([lines[0], *(line.removeprefix("        ") for line in lines[1:end])]), names)
    task, twin = classify(), classify()
    opt = names["Lookahead"](SGD(task.model, lr=0.1), every=2)
    start = trained(twin)
    fast = play(SGD(twin.model, lr=0.1), twin, 2)
    found = play(opt, task, 2)
    assert distance(found, [(a + b) / 2 for a, b in zip(start, fast, strict=True)]) < 1e-6
    saved = copy.deepcopy(opt.state_dict())
    wanted = play(opt, task, 3, 2)
    for p, value in zip(task.model.parameters(), found, strict=True):
        p.data.copy_(value)
    opt.load_state_dict(saved)
    assert same(play(opt, task, 3, 2), wanted)
