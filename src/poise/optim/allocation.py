"""Which parameters have state: it is given, brought to where the parameter is, and dropped."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .engine import shards, storage
from .engine.calls import initial
from .engine.members import LOW, Member


def give(members: Sequence[Member], state: MutableMapping[Tensor, dict[str, Tensor]]) -> None:
    """State for every member that has none; what a link shares over its parameters goes to the first that holds it."""
    held: set[int] = set()
    for m in members:
        if m.tensor not in state:
            state[m.tensor] = m.state = m.create()
        else:
            m.state = state[m.tensor]
            fit(m)
        for bound in m.bound:
            if id(bound.link) not in held:
                held.add(id(bound.link))
                for key in bound.shared.values():
                    slot = m.shared[key]
                    like = torch.empty(0, dtype=slot.dtype, device=m.device)
                    m.state.setdefault(key, initial(slot, slot.shape, like, None))


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
