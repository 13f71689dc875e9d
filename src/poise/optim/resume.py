"""What an optimizer keeps, brought back: a state_dict loaded strictly, and snapshots taken and put back.

Everything is checked first, then copied into the tensors that are there.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .allocation import put_to_sleep
from .engine import shards, storage
from .engine.calls import initial
from .engine.members import LOW

if TYPE_CHECKING:
    from .engine.members import Member

State = MutableMapping[Tensor, dict[str, Tensor]]  # what is kept, by parameter; one whose state was dropped is not in it


def written_out(saved: dict[str, Any]) -> dict[str, Any]:
    """A state_dict in which state at rest, which takes no memory, has some: what loads it may copy into it."""
    if not any(isinstance(v, Tensor) and storage.rests(v) for slots in saved["state"].values() for v in slots.values()):
        return saved
    whole = {
        index: {key: storage.dense(v) if isinstance(v, Tensor) else v for key, v in slots.items()}
        for index, slots in saved["state"].items()
    }
    return {**saved, "state": whole}


def load(members: Sequence[Member], groups: Sequence[dict[str, Any]], state: State, saved: Mapping[str, Any]) -> bool:
    """Copy `saved` into `groups` and `state`; whether it gave state to a parameter that had none, or took it from a frozen one.

    Raises:
        ValueError: naming what differs, before anything is changed.
    """
    for part in ("state", "param_groups"):
        if part not in saved:
            raise ValueError(f"state_dict has no {part!r}: is it the state_dict of an optimizer?")
    saved_groups = saved["param_groups"]
    if len(saved_groups) != len(groups):
        raise ValueError(f"state_dict has {len(saved_groups)} parameter groups, this optimizer has {len(groups)}")
    by_tensor = {m.tensor: m for m in members}
    copies: list[tuple[dict[str, Tensor], str, Tensor]] = []
    woken: dict[Tensor, dict[str, Tensor]] = {}
    asleep: list[Member] = []
    for number, (group, old) in enumerate(zip(groups, saved_groups, strict=True)):
        _check_group(number, group, old)
        for tensor, name, index in zip(group["params"], group["param_names"], old["params"], strict=True):
            mine, old = state.get(tensor, {}), saved["state"].get(index, {})
            m = by_tensor.get(tensor)
            if m is not None and "step" in old and not m.awake:
                mine = woken[tensor] = mine | m.create()
            elif m is not None and "step" not in old and m.awake and not m.wanted:
                asleep.append(m)
                mine = {key: value for key, value in mine.items() if key in m.shared}
            copies += _matched(name, mine, old)
    with torch.no_grad():
        for mine, key, value in copies:
            storage.put(mine, key, value)
    state.update(woken)
    for m in asleep:
        put_to_sleep(m, state)
    for group, old in zip(groups, saved_groups, strict=True):
        group.update({key: _plain(value) for key, value in old.items() if key not in ("params", "param_names")})
    return bool(woken or asleep)


def _check_group(number: int, group: Mapping[str, Any], old: Mapping[str, Any]) -> None:
    missing = [key for key in group if key not in old and key not in ("param_names", "initial_lr")]
    if missing:
        raise ValueError(
            f"group {number}: the state_dict lacks {', '.join(map(repr, missing))}; it has {', '.join(map(repr, old))}"
        )
    if old["rule"] != group["rule"]:
        raise ValueError(f"group {number}: the state_dict is of rule {old['rule']!r}, this group's is {group['rule']!r}")
    if len(old["params"]) != len(group["params"]):
        raise ValueError(
            f"group {number}: the state_dict has {len(old['params'])} parameters, this group {len(group['params'])}"
        )
    names = old.get("param_names")
    if names is not None and list(names) != list(group["param_names"]):
        wrong = next((a, b) for a, b in zip(names, group["param_names"], strict=True) if a != b)
        raise ValueError(f"group {number}: the state_dict has parameter {wrong[0]!r} where this optimizer has {wrong[1]!r}")


def _matched(name: str, mine: dict[str, Tensor], old: Mapping[str, Tensor]) -> list[tuple[dict[str, Tensor], str, Tensor]]:
    if mine and not old:
        raise ValueError(
            f"parameter {name!r}: the state_dict has no state for it; if it was frozen when that was saved, load while it is "
            "frozen here too, and unfreeze it then"
        )
    lacking, strange = [k for k in mine if k not in old], [k for k in old if k not in mine]
    if lacking or strange:
        raise ValueError(
            f"parameter {name!r}: the state_dict has {', '.join(map(repr, old))}, this optimizer keeps "
            f"{', '.join(map(repr, mine))}; build it with the rule and the state= and weights= formats that were saved"
        )
    pairs = []
    for key, target in mine.items():
        value = torch.as_tensor(old[key])
        if key == "step":
            value = value.to(target.dtype).reshape(target.shape)
        if tuple(value.shape) != tuple(target.shape):
            raise ValueError(
                f"parameter {name!r}: {key!r} has shape {tuple(value.shape)} in the state_dict, {tuple(target.shape)} here"
            )
        if value.dtype != target.dtype:
            raise ValueError(f"parameter {name!r}: {key!r} is {value.dtype} in the state_dict, {target.dtype} here")
        pairs.append((mine, key, value))
    return pairs


def _plain(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def take(groups: Sequence[Mapping[str, Any]], kept: State, state: bool, params: bool) -> dict[str, Any]:
    """A copy of weights and of everything that is kept."""
    tensors = [p for group in groups for p in group["params"]]
    taken: dict[str, Any] = {"params": [shards.local(p).detach().clone() for p in tensors] if params else None, "state": None}
    if state:
        held = [kept.get(p, {}) for p in tensors]
        taken["state"] = [{key: storage.copied(value) for key, value in one.items()} for one in held]
        taken["clocks"] = [group["clock"] for group in groups]
    return taken


def having(groups: Sequence[Mapping[str, Any]], taken: Mapping[str, Any]) -> set[Tensor] | None:
    """Parameters that had state when `take` copied it; None if it copied none."""
    if taken["state"] is None:
        return None
    tensors = _tensors(groups, taken["state"])
    return {p for p, state in zip(tensors, taken["state"], strict=True) if "step" in state}


def put_back(groups: Sequence[dict[str, Any]], kept: State, taken: Mapping[str, Any]) -> None:
    """What `take` copied, bit for bit, where `kept` has state for the same parameters."""
    tensors = _tensors(groups, taken["params"] if taken["params"] is not None else taken["state"])
    for i, p in enumerate(tensors):
        if taken["params"] is not None:
            shards.local(p).detach().copy_(taken["params"][i])
        if taken["state"] is not None:
            for key, value in taken["state"][i].items():
                storage.put(kept[p], key, value, may_rest=True)
    if taken["state"] is not None:
        for group, clock in zip(groups, taken["clocks"], strict=True):
            group["clock"] = clock


def _tensors(groups: Sequence[Mapping[str, Any]], known: Sequence[Any] | None) -> list[Tensor]:
    """All parameters, if there are as many as are known in a snapshot."""
    tensors = [p for group in groups for p in group["params"]]
    if known is not None and len(known) != len(tensors):
        raise ValueError(f"restore: the snapshot is of {len(known)} parameters, this optimizer has {len(tensors)}")
    return tensors


def begin(members: Sequence[Member], groups: Sequence[dict[str, Any]], only: set[Tensor] | None = None) -> None:
    """State as it is before the first step, in the tensors that are there.

    Args:
        only: parameters that begin anew; then what several of them share, and the clocks of the groups, stay. None: all.
    """
    if only is not None:
        members = [m for m in members if m.tensor in only]
        groups = ()
    for m in members:
        begun = m.create() if m.awake else {}
        begun.pop(LOW, None)
        for key, slot in m.shared.items() if only is None else ():
            if key in m.state:
                begun[key] = initial(slot, slot.shape, m.state[key], None)
        for key, value in begun.items():
            storage.put(m.state, key, value, may_rest=key in m.resting)
    for group in groups:
        group["clock"] = 0
