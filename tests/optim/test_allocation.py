"""Who has state: everyone that is trained, from the beginning, and who is frozen, from when it is unfrozen."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conformance.problems import Grads, distance, draw, leaves, same
from optim.toys import heavy, optimizer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from poise.optim import SOAP, AdamMini, AdamW, Muon, Slot, Transform, chain
from poise.optim.transforms.clipping import clip

# Rules of elements, of blocks, of matrices (with AdamW on vectors), of matrices that drive others.
RULES: list[Callable[..., Any]] = [AdamW, AdamMini, Muon, SOAP]
SHAPES = [(64, 128), (64,), (32, 160), (32,)]
FROZEN = (0, 1)  # a matrix that every format encodes, and a vector


def half(start: list[Tensor], dtype: torch.dtype | None = None, frozen: tuple[int, ...] = FROZEN) -> list[nn.Parameter]:
    params = leaves(start, dtype)
    for i in frozen:
        params[i].requires_grad_(False)
    return params


def train(opt: Any, params: list[nn.Parameter], grads: Grads) -> list[Tensor]:
    """As backward() would: a frozen parameter gets no gradient."""
    for row in grads:
        for p, g in zip(params, row, strict=True):
            p.grad = g.to(p.dtype).clone() if g is not None and p.requires_grad else None
        opt.step()
    return [p.detach().clone() for p in params]


def named(params: list[nn.Parameter], which: range | tuple[int, ...] = range(4)) -> list[tuple[str, nn.Parameter]]:
    return [(f"p{i}", params[i]) for i in which]


@pytest.mark.parametrize("state", ["fp32", "int8"])
@pytest.mark.parametrize("rule", RULES)
def test_a_half_frozen_model_is_trained_as_its_other_half_alone_and_holds_as_much(rule: Any, state: str) -> None:
    start, grads = draw(SHAPES, 2, dtype=torch.bfloat16)
    params, twins = half(start), leaves(start)
    opt = rule(named(params), lr=0.01, state=state, backend="eager")
    twin = rule(named(twins, (2, 3)), lr=0.01, state=state, backend="eager")
    assert opt.state_bytes() == twin.state_bytes() > 0
    assert [p in opt.state for p in params] == [False, False, True, True]
    assert len(opt.state_dict()["state"]) == 2
    found = train(opt, params, grads)
    for row in grads:
        row[0] = row[1] = None
    wanted = train(twin, twins, grads)
    assert same(found, wanted)  # rounding noise too
    assert opt.state_bytes() == twin.state_bytes()


@pytest.mark.parametrize("backend", ["eager", "tiles"])
def test_a_parameter_that_is_unfrozen_later_starts_as_with_torch(backend: Any) -> None:
    start, grads = draw(SHAPES, 7)
    params, twins = half(start), half(start)
    opt = AdamW(params, lr=0.1, weight_decay=0.1, backend=backend)
    twin = torch.optim.AdamW(twins, lr=0.1, weight_decay=0.1)
    assert distance(train(opt, params, grads[:3]), train(twin, twins, grads[:3])) < 1e-12
    before = opt.state_bytes()
    for p in (params[0], twins[0]):
        p.requires_grad_(True)
    assert distance(train(opt, params, grads[3:]), train(twin, twins, grads[3:])) < 1e-12
    for p, q in zip(params, twins, strict=True):
        assert int(opt.state.get(p, {}).get("step", -1)) == int(twin.state[q]["step"] if twin.state.get(q) else -1)
    assert [int(opt.state[params[i]]["step"]) for i in (0, 2)] == [4, 7] and params[1] not in opt.state
    assert opt.state_bytes() - before == 2 * 8 * 64 * 128


def test_a_gradient_that_stands_in_a_frozen_parameter_moves_it_as_with_torch() -> None:
    start, grads = draw(SHAPES, 2)
    params, twins = half(start), half(start)
    opt, twin = AdamW(params, lr=0.1, backend="eager"), torch.optim.AdamW(twins, lr=0.1)
    for row in grads:
        for p, q, g in zip(params, twins, row, strict=True):
            assert g is not None
            p.grad, q.grad = g.clone(), g.clone()
        opt.step()
        twin.step()
    assert distance(params, twins) < 1e-12


def test_state_stays_with_a_parameter_that_is_frozen_in_mid_run() -> None:
    start, grads = draw(SHAPES, 6)
    params, twins = leaves(start), leaves(start)
    opt, twin = AdamW(params, lr=0.1, backend="eager"), torch.optim.AdamW(twins, lr=0.1)
    for frozen, rows in ((False, grads[:2]), (True, grads[2:4]), (False, grads[4:])):
        for p in (params[0], twins[0]):
            p.requires_grad_(not frozen)
        assert distance(train(opt, params, rows), train(twin, twins, rows)) < 1e-12
    assert int(opt.state[params[0]]["step"]) == 4


def test_the_lower_halves_of_split_weights_come_when_they_are_needed() -> None:
    start, grads = draw(SHAPES, 4, dtype=torch.bfloat16)
    params, twins = half(start), leaves(start, torch.float32)
    opt = AdamW(params, lr=1e-4, weights="split", backend="eager")
    assert opt.state_bytes() == (2 * 4 + 2) * (32 * 160 + 32)
    train(opt, params, grads[:2])
    for p in params:
        p.requires_grad_(True)
    found = train(opt, params, grads[2:])
    twin = AdamW(twins[:2], lr=1e-4, backend="eager")
    wanted = train(twin, twins[:2], [row[:2] for row in grads[2:]])
    for a, b in zip(found[:2], wanted, strict=True):
        assert float((a != b.bfloat16()).float().mean()) < 0.01  # halves are rounded up, and to even


# -- saved, copied, put back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [AdamW, SOAP])
def test_a_half_frozen_state_dict_goes_round(rule: Any) -> None:
    start, grads = draw(SHAPES, 7)
    params = half(start)
    opt = rule(params, lr=0.1, backend="eager")
    train(opt, params, grads[:2])
    saved, weights = copy.deepcopy(opt.state_dict()), [p.detach().clone() for p in params]
    again = half(weights)
    loaded = rule(again, lr=0.1, backend="eager")
    loaded.load_state_dict(saved)
    for one in (params, again):
        one[0].requires_grad_(True)
    assert same(train(loaded, again, grads[2:4]), train(opt, params, grads[2:4]))
    # saved once more, with state for what was unfrozen: it comes along where that is frozen
    saved, weights = copy.deepcopy(opt.state_dict()), [p.detach().clone() for p in params]
    third = half(weights)
    frozen = rule(third, lr=0.1, backend="eager")
    frozen.load_state_dict(saved)
    assert frozen.state_bytes() == opt.state_bytes()
    third[0].requires_grad_(True)
    assert same(train(frozen, third, grads[4:]), train(opt, params, grads[4:]))


def test_state_that_was_not_saved_is_an_error_for_what_is_trained_and_dropped_for_what_is_frozen() -> None:
    start, grads = draw(SHAPES, 5)
    params = half(start)
    opt = AdamW(params, lr=0.1, backend="eager")
    train(opt, params, grads[:2])
    again = leaves([p.detach() for p in params])
    loaded = AdamW(again, lr=0.1, backend="eager")
    before = copy.deepcopy(loaded.state_dict())
    with pytest.raises(ValueError, match=r"'param_0': the state_dict has no state for it; if it was frozen"):
        loaded.load_state_dict(opt.state_dict())
    assert str(loaded.state_dict()) == str(before)
    for p in again[:2]:
        p.requires_grad_(False)
    loaded.load_state_dict(opt.state_dict())
    assert loaded.state_bytes() == opt.state_bytes() and again[0] not in loaded.state
    for p in (*params, *again):
        p.requires_grad_(True)
    assert same(train(loaded, again, grads[2:]), train(opt, params, grads[2:]))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_is_as_frozen_as_the_original(how: str) -> None:
    start, grads = draw(SHAPES, 4)
    params = half(start)
    opt = AdamW(params, lr=0.1, backend="eager")
    train(opt, params, grads[:2])
    twins, twin = copy.deepcopy((params, opt)) if how == "deepcopy" else pickle.loads(pickle.dumps((params, opt)))
    assert twin.state_bytes() == opt.state_bytes()
    for p in (*params, *twins):
        p.requires_grad_(True)
    assert same(train(twin, twins, grads[2:]), train(opt, params, grads[2:]))


def test_a_snapshot_puts_back_who_had_state() -> None:
    start, grads = draw(SHAPES, 6)
    params = half(start)
    opt = AdamW(params, lr=0.1, backend="eager")
    train(opt, params, grads[:2])
    early = opt.snapshot()
    params[0].requires_grad_(True)
    wanted = train(opt, params, grads[2:4])
    late = opt.snapshot()
    params[0].requires_grad_(False)
    opt.zero_grad()
    opt.restore(early)
    assert params[0] not in opt.state
    params[0].requires_grad_(True)
    assert same(train(opt, params, grads[2:4]), wanted)
    wanted = train(opt, params, grads[4:])
    params[0].requires_grad_(False)
    opt.zero_grad()
    opt.restore(early)
    opt.restore(late)
    params[0].requires_grad_(True)
    assert same(train(opt, params, grads[4:]), wanted)


# -- told ----------------------------------------------------------------------------------------------------------------


def test_a_plan_says_that_a_frozen_parameter_gets_no_state() -> None:
    params = half(draw(SHAPES, 0)[0])
    opt = AdamW(params, lr=0.1, backend="eager")
    lines = list(opt.plan())
    assert [line.state for line in lines] == ["none (frozen)"] * 2 + ["float64+float64"] * 2
    assert [line.state_bytes for line in lines][:2] == [0, 0]
    assert [line.update_rms for line in lines][:2] == [0.0, 0.0]
    assert sum(line.state_bytes for line in lines) == opt.state_bytes()
    assert "none (frozen)" in str(opt.plan())


def test_what_a_frozen_parameter_would_get_can_be_previewed_and_leaves_no_state() -> None:
    start, grads = draw(SHAPES, 1)
    params, twins = half(start), leaves(start)
    opt, twin = AdamW(params, lr=0.1, backend="eager"), AdamW(twins, lr=0.1, backend="eager")
    row: Any = grads[0]
    found, wanted = opt.preview(row), twin.preview(row)
    assert list(found) == list(wanted) and same(list(found.values()), list(wanted.values()))
    assert params[0] not in opt.state and params[0].grad is None
    assert opt.state_bytes() == 2 * 8 * (32 * 160 + 32)


def test_steps_of_a_wholly_frozen_model_do_nothing() -> None:
    start, grads = draw(SHAPES, 2)
    params = half(start, frozen=(0, 1, 2, 3))
    opt = Muon(params, lr=0.1, backend="eager")
    assert same(train(opt, params, grads), start)
    assert opt.state_bytes() == 0 and opt.state_dict()["state"] == {} and opt.preview() == {}


# -- what parameters share -----------------------------------------------------------------------------------------------


def test_what_a_link_shares_stays_where_it_is_when_its_first_parameter_is_unfrozen() -> None:
    start, _ = draw(SHAPES, 0)
    params, others = half(start), leaves(start)
    opt = optimizer(params, chain(clip(1.0, nonfinite="skip"), heavy()), lr=0.1)
    broken: Grads = [[torch.full_like(p, float("nan")) for p in params]]
    train(opt, params, broken)
    assert float(opt.state[params[0]]["skipped"]) == 1.0
    params[0].requires_grad_(True)
    train(opt, params, broken * 2)
    assert [float(opt.state[p]["skipped"]) for p in params if "skipped" in opt.state.get(p, {})] == [3.0]
    again = optimizer(others, chain(clip(1.0, nonfinite="skip"), heavy()), lr=0.1)
    others[1].requires_grad_(False)
    again.load_state_dict(opt.state_dict())
    assert float(again.state[others[0]]["skipped"]) == 3.0
    again.begin_anew()
    assert float(again.state[others[0]]["skipped"]) == 0.0


class joint(Transform):
    """Heavy-ball momentum of a weight and its bias as one matrix."""

    unit = "layer"

    def slots(self, p: Any) -> dict[str, Slot]:
        return {"buffer": Slot(tuple(p.shape), dims=(None, None))}

    def update(self, u: Tensor, state: Any, x: Tensor, k: Any) -> Tensor:
        state["buffer"] = 0.5 * state["buffer"] + u
        return state["buffer"]


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_layer_of_which_one_parameter_is_trained_has_the_state_of_both(frozen: str) -> None:
    ends = []
    for freeze in (True, False):
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
        model.load_state_dict({name: torch.ones_like(t) for name, t in model.state_dict().items()})
        if freeze:
            model.get_parameter(f"0.{frozen}").requires_grad_(False)
            model[1].requires_grad_(False)
        opt = optimizer(model, joint(), lr=0.1)
        if freeze:
            assert opt.state_bytes() == 8 * 3 * 5  # of the joint matrix of the first layer, none of the second
        for _ in range(3):
            for name, p in model[0].named_parameters():
                p.grad = None if name == frozen else torch.ones_like(p)
            opt.step()
        ends.append([p.detach() for p in model.parameters()])
    assert same(*ends)


# -- shards --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """One rank of two, as far as bookkeeping goes."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield DeviceMesh("cpu", [0, 1])
    dist.destroy_process_group()


@pytest.mark.parametrize("state", ["fp32", "int8"])
def test_a_shard_that_is_frozen_has_no_state_until_it_is_unfrozen(state: str, mesh: DeviceMesh) -> None:
    def sharded(t: Tensor) -> DTensor:
        return DTensor.from_local(t[:32].clone(), mesh, [Shard(0)], run_check=False)

    whole = draw([(64, 128)], 2, dtype=torch.float32)
    params = [nn.Parameter(sharded(whole[0][0]), requires_grad=trained) for trained in (True, False)]
    opt = AdamW(params, lr=0.1, state=state, backend="eager")
    one = opt.state_bytes()
    assert params[1] not in opt.state and one < (8.1 if state == "fp32" else 2.2) * 32 * 128
    params[1].requires_grad_(True)
    for p in params:
        g = whole[1][0][0]
        assert g is not None
        p.grad = sharded(g)
    opt.step()
    assert opt.state_bytes() == 2 * one
    assert all(isinstance(v, DTensor) and v.shape[0] == 64 for key, v in opt.state[params[1]].items() if key != "step")
    assert torch.equal(params[0].to_local(), params[1].to_local())  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("state", ["fp32", "bf16", "int8", "int4-rank1"])
def test_state_is_read_as_numbers_in_whatever_format(state: str) -> None:
    """After one step AdamW's moments are what the gradient says, up to the format's rounding; what is read is a copy."""
    (start, (grads,)) = draw(SHAPES, 1, dtype=torch.float32)
    params, exact = leaves(start), leaves(start)
    opt, twin = AdamW(params, lr=0.1, state=state), AdamW(exact, lr=0.1)
    for some, one in ((params, opt), (exact, twin)):
        for p, g in zip(some, grads, strict=True):
            assert g is not None
            p.grad = g.clone()
        one.step()
    for p, g in zip(params, grads, strict=True):
        assert g is not None
        kept, found = {key: value.clone() for key, value in opt.state[p].items()}, opt.values(p)
        assert set(found) == {"exp_avg", "exp_avg_sq"} and all(value.shape == p.shape for value in found.values())
        for key, wanted in (("exp_avg", 0.1 * g), ("exp_avg_sq", 0.001 * g * g)):
            off = 0.0 if state == "fp32" or p.ndim == 1 else 0.2 if state == "int4-rank1" else 0.03
            assert float((found[key] - wanted).abs().max()) <= (off + 1e-6) * float(wanted.abs().max())
            found[key].zero_()
        assert all(torch.equal(opt.state[p][key], value) for key, value in kept.items())
    with pytest.raises(ValueError, match=r"shape \[64, 128\] is no parameter"):
        opt.values(exact[0])


def test_a_frozen_parameter_has_no_values_until_it_has_state() -> None:
    params = half(draw(SHAPES, 1)[0])
    opt = AdamW(params, lr=0.1)
    assert opt.values(params[FROZEN[0]]) == {} and set(opt.values(params[-1])) == {"exp_avg", "exp_avg_sq"}
