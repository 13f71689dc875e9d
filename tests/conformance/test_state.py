"""A run that is stopped, saved and taken up elsewhere is the same run, bit for bit; a state that does not fit is refused."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from poise.catalog import Method

from .cases import STATES, build, grads_like, net, tensors_of
from .problems import SHAPES, draw, leaves, play, same


@pytest.mark.parametrize(
    "dtype, backend, state",
    [
        (torch.float32, "eager", "fp32"),
        (torch.float32, "eager", "bf16"),
        (torch.bfloat16, "eager", "int8"),
        (torch.bfloat16, "auto", "int4"),
    ],
    ids=["float32 eager-fp32", "float32 eager-bf16", "bfloat16 eager-int8", "bfloat16 compiled-int4"],
)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    entry: Method, state: str, dtype: torch.dtype, backend: str, tmp_path: Path
) -> None:
    start, grads = draw(SHAPES[:2], 6, dtype=dtype)
    params = leaves(start)
    opt = build(entry, params, state=state, backend=backend)
    halfway = play(opt, params, grads[:3])
    torch.save(opt.state_dict(), tmp_path / "state.pt")
    wanted = play(opt, params, grads[3:])

    fresh = leaves(halfway)
    again = build(entry, fresh, state=state, backend=backend, lr=0.5)  # the saved lr must win
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(saved)
    kept = copy.deepcopy(saved)
    assert same(play(again, fresh, grads[3:]), wanted)
    assert {k: v.dtype for k, v in tensors_of(again).items()} == {k: v.dtype for k, v in tensors_of(opt).items()}
    assert same(list(tensors_of(again).values()), list(tensors_of(opt).values()))
    for index, slots in kept["state"].items():  # what was loaded is a copy: training on did not write into it
        tensors = [slot for slot in slots if torch.is_tensor(slots[slot])]
        assert same([saved["state"][index][slot] for slot in tensors], [slots[slot] for slot in tensors])


def test_the_lower_half_of_split_weights_is_saved_too(entry: Method) -> None:
    start, grads = draw(SHAPES[:2], 6, dtype=torch.bfloat16)
    params = leaves(start)
    opt = build(entry, params, weights="split", backend="eager")
    fresh = leaves(play(opt, params, grads[:3]))
    again = build(entry, fresh, weights="split", backend="eager")
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert same(play(again, fresh, grads[3:]), play(opt, params, grads[3:]))


@pytest.mark.parametrize("state", STATES)
def test_the_state_exists_before_the_first_step(entry: Method, state: str) -> None:
    start, grads = draw(SHAPES[:2], 1, dtype=torch.bfloat16)
    params = leaves(start)
    opt = build(entry, params, state=state, backend="eager")
    before = {name: (t.shape, t.dtype) for name, t in tensors_of(opt).items()}
    play(opt, params, grads)
    assert {name: (t.shape, t.dtype) for name, t in tensors_of(opt).items()} == before
    assert {int(name.split("/")[0]) for name in before} == set(range(len(params)))


def test_a_state_loaded_before_the_first_step_starts_afresh(entry: Method) -> None:
    start, grads = draw(SHAPES[:2], 3, dtype=torch.float32)
    params, fresh = leaves(start), leaves(start)
    opt = build(entry, params, backend="eager")
    begin = copy.deepcopy(opt.state_dict())
    wanted = play(opt, params, grads)
    again = build(entry, fresh, backend="eager")
    play(again, fresh, grads[:2])
    again.load_state_dict(begin)
    for p, q in zip(fresh, start, strict=True):
        p.data.copy_(q)
    assert same(play(again, fresh, grads), wanted)


def late(saved: dict[str, Any]) -> tuple[int, str]:
    """The last parameter and its largest slot: what is checked while it is copied has copied the others by then."""
    index = max(saved["state"])
    _, slot = max((v.numel(), slot) for slot, v in saved["state"][index].items() if torch.is_tensor(v))
    return index, slot


def missing_slot(saved: dict[str, Any]) -> str:
    index, slot = late(saved)
    del saved["state"][index][slot]
    return slot


def unknown_slot(saved: dict[str, Any]) -> str:
    saved["state"][late(saved)[0]]["heavy_ball"] = torch.zeros(3)
    return "heavy_ball"


def wrong_shape(saved: dict[str, Any]) -> str:
    index, slot = late(saved)
    value = saved["state"][index][slot]
    saved["state"][index][slot] = torch.zeros((*value.shape, 2), dtype=value.dtype)
    return slot


def wrong_dtype(saved: dict[str, Any]) -> str:
    index, slot = late(saved)
    saved["state"][index][slot] = saved["state"][index][slot].to(torch.float16)
    return slot


def missing_group_key(saved: dict[str, Any]) -> str:
    del saved["param_groups"][0]["lr"]
    return "lr"


def missing_parameter(saved: dict[str, Any]) -> str:
    saved["param_groups"][0]["params"].pop()
    return "param"


@pytest.mark.parametrize("spoil", [missing_slot, unknown_slot, wrong_shape, wrong_dtype, missing_group_key, missing_parameter])
def test_a_state_that_does_not_fit_is_refused_by_name_and_changes_nothing(
    entry: Method, spoil: Callable[[dict[str, Any]], str]
) -> None:
    start, grads = draw(SHAPES[:2], 4, dtype=torch.float32)
    params, other = leaves(start), leaves(start)
    opt, giver = build(entry, params, backend="eager"), build(entry, other, backend="eager", lr=0.3)
    play(opt, params, grads[:2])
    play(giver, other, grads[2:])
    before = tensors_of(opt)
    saved = copy.deepcopy(giver.state_dict())
    named = spoil(saved)
    with pytest.raises((ValueError, TypeError), match=re.escape(named)):
        opt.load_state_dict(saved)
    assert same(list(tensors_of(opt).values()), list(before.values()))
    assert all(group["lr"] != 0.3 for group in opt.param_groups)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("state", ["fp32", "int4"])
def test_distributed_checkpoint_brings_a_run_back_in_one_process(entry: Method, state: str, tmp_path: Path) -> None:
    model = net(dtype=torch.bfloat16)
    params = list(model.parameters())
    grads = grads_like(params, 5)
    opt = build(entry, model, state=state, backend="eager")
    play(opt, params, grads[:3])
    save({"model": model.state_dict(), "optim": get_optimizer_state_dict(model, opt)}, checkpoint_id=tmp_path)
    wanted = play(opt, params, grads[3:])

    fresh = net(seed=1, dtype=torch.bfloat16)
    again = build(entry, fresh, state=state, backend="eager", lr=0.5)
    shell = {"model": fresh.state_dict(), "optim": get_optimizer_state_dict(fresh, again)}
    load(shell, checkpoint_id=tmp_path)
    fresh.load_state_dict(shell["model"])
    set_optimizer_state_dict(fresh, again, shell["optim"])
    assert same(play(again, list(fresh.parameters()), grads[3:]), wanted)
    assert same(list(tensors_of(again).values()), list(tensors_of(opt).values()))
