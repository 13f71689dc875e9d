"""Which parameters have state: it is given, brought to where the parameter is, and dropped."""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .engine import shards, storage
from .engine.calls import initial
from .engine.members import LOW, Member
from .engine.totals import holders


def give(members: Sequence[Member], state: MutableMapping[Tensor, dict[str, Tensor]]) -> None:
    """State for every member that needs some and has none.

    What exists before the first step can be planned, loaded into and sharded, so it is not left to come with the gradients; but
    a frozen parameter gets none until it is unfrozen or has a gradient. Once there, state stays. What a link shares over its
    parameters stands with the first of them, frozen or not.
    """
    for m in members:
        m.state = state.get(m.tensor, {})
        if m.wanted or m.awake:
            state[m.tensor] = m.state
            fit(m)
    for m, bound in holders(members).values():
        for key in bound.shared.values():
            slot = m.shared[key]
            like = torch.empty(0, dtype=slot.dtype, device=m.device)
            state.setdefault(m.tensor, m.state).setdefault(key, initial(slot, slot.shape, like, None))


def fit(m: Member) -> None:
    """Bring a parameter's state to where and how the parameter now is: its device, and, for plain slots, its computing dtype.

    Raises:
        ValueError: if the parameter has changed its shape.
    """
    wanted = m.create()
    for key, like in wanted.items():
        if key not in m.state:
            m.state[key] = like
            continue
        value = m.state[key]
        if tuple(value.shape) != tuple(like.shape):
            raise ValueError(
                f"parameter {m.spec.name!r}: its state {key!r} has shape {tuple(value.shape)} and should now have "
                f"{tuple(like.shape)}; a parameter that changes its shape needs a new optimizer"
            )
        if storage.rests(value) and storage.rests(like):
            m.state[key] = like
        elif value.dtype != like.dtype or shards.local(value).device != shards.local(like).device:
            m.state[key] = value.to(device=shards.local(like).device, dtype=like.dtype)
    for key in [key for key in m.state if key not in wanted and key not in m.shared]:
        del m.state[key]


def match(members: Sequence[Member], state: MutableMapping[Tensor, dict[str, Tensor]], having: Collection[Tensor]) -> bool:
    """Let those of `members` have state whose parameters are in `having`, and no others; whether that changed anything."""
    changed = [m for m in members if m.awake != (m.tensor in having)]
    for m in changed:
        if m.awake:
            put_to_sleep(m, state)
        else:
            state[m.tensor] = m.state | m.create()
    return bool(changed)


def put_to_sleep(m: Member, state: MutableMapping[Tensor, dict[str, Tensor]]) -> None:
    """Take the state of a parameter, but for what its link shares."""
    shared = {key: value for key, value in m.state.items() if key in m.shared}
    if shared:
        state[m.tensor] = shared
    else:
        del state[m.tensor]


def drop(groups: Sequence[Mapping[str, Any]], state: MutableMapping[Tensor, dict[str, Tensor]], kept: frozenset[str]) -> None:
    """Take the state of all parameters but those in `kept`; the lower halves of split weights are weights, and stay."""
    for group in groups:
        for tensor, name in zip(group["params"], group["param_names"], strict=True):
            if name not in kept and tensor in state:
                low = state[tensor].get(LOW)
                if low is None:
                    del state[tensor]
                else:
                    state[tensor] = {LOW: low}


def values(member: Member) -> dict[str, Tensor]:
    """Its own state, read from the formats that it is kept in."""
    if not member.awake:
        return {}
    read = {key: (store, store.read(member.state).clone()) for key, store in member.stores.items()}
    return {key: shards.like(member.tensor, value, store.slot.shape, member.dims[key]) for key, (store, value) in read.items()}
