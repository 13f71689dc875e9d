"""What a parameter keeps, for links that see it whole: gathered when it is looked at, scattered when it is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor

from poise.memory.rounding import int32, noise_bits

from . import shards
from .calls import settled
from .links import Bound
from .members import LOW, Member, state_draw
from .views import stored_as, view_of


def stored_weights(member: Member) -> dict[str, Tensor]:
    """What a WeightFormat reads."""
    stored = {"x": member.local}
    if LOW in member.state:
        stored[LOW] = shards.local(member.state[LOW])
    return stored


def assigned(states: Mapping[str, Tensor], written: Iterable[str], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What rules assigned, apart from the memory of what was there; a tensor that was written in place stands for itself."""
    values = {key: states[key] for key in written}
    new = {key: value for key, value in values.items() if value is not before.get(key)}
    return values | settled(new, before.values())


class Held(MutableMapping[str, Tensor]):
    """The values of some links' slots, each gathered when it is first looked at: what no rule looks at costs nothing.

    Gathered unless the link sees pieces; those of the parameter's shape are as the link sees the parameter. `before` is what
    was there.
    """

    def __init__(self, member: Member, bounds: Sequence[Bound]) -> None:
        self.member = member
        self.units = {key: b.link.unit for b in bounds for key in b.state_keys()}
        self._values: dict[str, Tensor] = {}
        self.before: dict[str, Tensor] = {}

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._values:
            m, store, unit = self.member, self.member.stores[key], self.units[key]
            value = store.read(m.state)
            if unit != "piece":
                value = shards.gather_as(m.tensor, value, store.slot.shape, m.dims[key])
            same = tuple(store.slot.shape) == tuple(m.spec.shape)
            self._values[key] = self.before[key] = view_of(unit, m.spec, value) if same else value
        return self._values[key]

    def __setitem__(self, key: str, value: Tensor) -> None:
        self._values[key] = value

    def __delitem__(self, key: str) -> None:
        raise TypeError(f"state {key!r} cannot be deleted")

    def __iter__(self) -> Iterator[str]:
        return iter(self.units)

    def __len__(self) -> int:
        return len(self.units)


def keep_states(member: Member, states: Mapping[str, Tensor], step: int) -> None:
    """Write slots back to where they are kept."""
    units = {key: b.link.unit for b in member.bound for key in b.state_keys()}
    for position, (key, store) in enumerate(member.stores.items()):
        if key in states:
            same = tuple(store.slot.shape) == tuple(member.spec.shape)
            value = states[key]
            if units[key] != "piece":
                whole = stored_as(units[key] if same else "tensor", member.spec, value, store.slot.shape)
                value = shards.scatter_as(member.tensor, whole, store.slot.shape, member.dims[key])
            stochastic = store.codec is not None and store.codec.stochastic
            bits = None
            if stochastic:
                salt, half = state_draw(position)
                bits = half(member.bits(step, salt) if same else _bits_of(member, key, step, salt))
            store.write(member.state, value.reshape(store.shape), bits)


def _bits_of(member: Member, key: str, step: int, salt: int) -> Tensor:
    """Random bits for this rank's piece of a slot of another shape than the parameter's."""
    shape = member.stores[key].slot.shape
    whole = torch.arange(math.prod(shape), dtype=torch.int32, device=member.local.device).reshape(tuple(shape))
    where = shards.scatter_as(member.tensor, whole, shape, member.dims[key]).reshape(-1)
    return noise_bits(int32(member.noise_key(step) + salt), where)


def noise(members: Sequence[Member], steps: Sequence[int]) -> Callable[[int, Tensor], Tensor]:
    """Random bits for whole parameters, in the shape of a tensor."""

    def bits(salt: int, like: Tensor) -> Tensor:
        where = torch.arange(like.numel() // len(members), dtype=torch.int32, device=like.device)
        keys = [int32(m.noise_key(s) + salt) for m, s in zip(members, steps, strict=True)]
        return torch.stack([noise_bits(key, where) for key in keys]).reshape(like.shape)

    return bits


def piece_noise(member: Member, step: int) -> Callable[[int, Tensor], Tensor]:
    """Random bits for this rank's piece of a parameter, in the shape of a tensor."""
    return lambda salt, like: member.bits(step, salt).reshape(like.shape)
