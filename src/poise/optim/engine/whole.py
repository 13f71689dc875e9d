"""Links that see whole parameters: matrices (equal ones at once), tensors, and the rare work of `refresh`.

A sharded parameter is gathered first, on every rank; what comes out, and the state, goes back to the shards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from poise.memory.rounding import int32, noise_bits

from ..transform import Transform
from . import shards
from .layers import joined, parted
from .links import Bound, Env, call_update, settled
from .measured import Columns
from .members import LOW, Member, state_draw
from .views import stored_as, view_of

ALONE = 2**19  # elements of a matrix from which on a CPU a batch of them gains nothing, and takes memory


class Whole:
    """A run of links that see whole parameters, over some members of one bucket."""

    def __init__(self, positions: Sequence[int]) -> None:
        self.positions = tuple(positions)

    def run(
        self,
        members: Sequence[Member],
        us: Sequence[Tensor],
        grads: Sequence[Tensor],
        rows: Sequence[Mapping[str, Any]],
        which: Sequence[int],
        steps: Sequence[int],
        facts: Callable[[int], dict[str, Any]],
    ) -> list[Tensor]:
        """The new updates, local. `facts(i)` gives totals, own values, feeds and known facts of member i.

        They take the memory of the old ones where that is not a gradient's: each is then held once, and a CPU need not find
        fresh memory in every step.
        """
        held = {g.untyped_storage()._cdata for g in grads}

        def kept(i: int, u: Tensor) -> Tensor:
            if us[i].untyped_storage()._cdata not in held:
                return us[i].copy_(u)
            return u.clone() if u.untyped_storage()._cdata in held else u  # what follows writes into it

        results: dict[int, Tensor] = {}
        at = {m: i for i, m in enumerate(members)}
        if members[0].bound[self.positions[0]].link.unit == "layer":
            for lead, follow in _layers(members):
                i = at.get(lead, at.get(follow)) if follow is not None else at[lead]
                assert i is not None
                outputs = self._layer(lead, follow, at, us, grads, rows[which[i]], steps[i], facts)
                results |= {at[m]: kept(at[m], u) for m, u in outputs.items() if m in at}
        else:
            for batch in self._batches(members, which):
                outputs = self._batch([members[i] for i in batch], [us[i] for i in batch], [grads[i] for i in batch],
                                      rows[which[batch[0]]], [steps[i] for i in batch], facts(batch[0]))  # fmt: skip
                results |= {i: kept(i, u) for i, u in zip(batch, outputs, strict=True)}
        return [results[i] for i in range(len(members))]

    def _batches(self, members: Sequence[Member], which: Sequence[int]) -> list[list[int]]:
        """Members whose matrices can be worked on at once: equal shapes, nothing kept or measured per parameter.

        Large ones go alone on a CPU.
        """
        links = [members[0].bound[i] for i in self.positions]
        fed = any(b.link.feeds or b.link.may_feed for b in links)
        alone = fed or any(b.slots or b.inner or b.link.unit != "matrix" or measures(b.link) for b in links)
        if alone or (members[0].device.type == "cpu" and members[0].spec.shape.numel() >= ALONE):
            return [[i] for i in range(len(members))]
        batches: dict[Any, list[int]] = {}
        for i, member in enumerate(members):
            p = member.spec
            batches.setdefault((p.shape, p.role == "experts", p.inputs_first, p.splits, p.heads, which[i]), []).append(i)
        return list(batches.values())

    def _batch(
        self,
        members: list[Member],
        us: list[Tensor],
        grads: list[Tensor],
        row: Mapping[str, Any],
        steps: list[int],
        facts: dict[str, Any],
    ) -> list[Tensor]:
        first = members[0]
        single = len(members) == 1
        blind = all(first.bound[i].link.blind for i in self.positions)

        here = first.bound[self.positions[0]].link.unit == "piece"  # what this rank holds is what is seen

        def together(pieces: list[Tensor]) -> Tensor:
            whole = pieces if here else [shards.gather(m.tensor, piece) for m, piece in zip(members, pieces, strict=True)]
            return whole[0] if single else _stack(whole)

        u = together(us)
        grad = u if blind else together([g.to(u.dtype) for g in grads])
        x = u if blind else together([m.format.read(stored_weights(m)) for m in members])
        facts = {**facts, "feeds": {name: together([fed]) for name, fed in facts["feeds"].items()}}
        bits = piece_noise(first, steps[0]) if here else noise(members, steps)
        u = self._links(first, u, grad, x, row, bits, steps[0], facts, single)
        pieces = [u] if single else u.unbind(0)
        if here:
            return [u.contiguous()]
        return [shards.scatter(m.tensor, piece).contiguous() for m, piece in zip(members, pieces, strict=True)]

    def _layer(
        self,
        lead: Member,
        follow: Member | None,
        at: Mapping[Member, int],
        us: Sequence[Tensor],
        grads: Sequence[Tensor],
        row: Mapping[str, Any],
        step: int,
        facts: Callable[[int], dict[str, Any]],
    ) -> dict[Member, Tensor]:
        """One layer; a parameter of it that has no gradient counts as zeros and is not moved."""
        update, grad = ({m: values[i] for m, i in at.items()} for values in (us, grads))
        u, g, x = seen("layer", lead, update), seen("layer", lead, grad), seen("layer", lead, None)
        fed = {m: facts(i)["feeds"] for m, i in at.items() if m in (lead, follow)}
        names = next(iter(fed.values()))
        feeds = {name: seen("layer", lead, {m: mine[name] for m, mine in fed.items()}) for name in names}
        known = {**facts(at[next(iter(fed))]), "feeds": feeds}
        u = self._links(lead, u, g, x, row, noise([lead], [step]), step, known, True)
        mine, theirs = parted(u, lead.spec, None if follow is None else follow.spec.shape)
        outputs = {lead: shards.scatter(lead.tensor, mine).contiguous()}
        if follow is not None and theirs is not None:
            outputs[follow] = shards.scatter(follow.tensor, theirs).contiguous()
        return outputs

    def _links(
        self,
        member: Member,
        u: Tensor,
        grad: Tensor,
        x: Tensor,
        row: Mapping[str, Any],
        bits: Callable[[int, Tensor], Tensor],
        step: int,
        facts: dict[str, Any],
        stateful: bool,
    ) -> Tensor:
        """The links one after another, on whole tensors, and their state kept."""
        links = [member.bound[i] for i in self.positions]
        states, written = Held(member, links if stateful else ()), set[str]()
        for bound in links:
            unit = bound.link.unit
            env = Env(view_of(unit, member.spec, grad), view_of(unit, member.spec, x), states, row, written, **facts)
            env.bits = lambda salt, like=env.x: bits(salt, like)
            env.known = {**env.known, "param": bound.param, "step": step}
            env.feeds = {name: view_of(unit, member.spec, fed) for name, fed in env.feeds.items()}
            u = stored_as(unit, member.spec, call_update(bound, view_of(unit, member.spec, u), env), u.shape)
        if any(u.untyped_storage()._cdata == old.untyped_storage()._cdata for old in states.before.values()):
            u = u.clone()  # the state is about to be overwritten
        keep_states(member, assigned(states, written, states.before), step)
        return u


def _layers(members: Sequence[Member]) -> list[tuple[Member, Member | None]]:
    """Every layer that one of the members belongs to, its leader first."""
    found: dict[Member, Member | None] = {}
    for m in members:
        lead = m if m.layer is None or m.layer.leads else m.partner
        assert lead is not None
        found[lead] = lead.partner
    return list(found.items())


def _stack(whole: list[Tensor]) -> Tensor:
    """Stacked; without a copy where the pieces already lie one behind another."""
    first, size = whole[0], whole[0].numel()
    adjacent = all(
        t.is_contiguous() and t.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and t.storage_offset() == first.storage_offset() + i * size
        for i, t in enumerate(whole)
    )  # fmt: skip
    if adjacent:
        return first.as_strided((len(whole), *first.shape), (size, *first.stride()))
    return torch.stack(whole)


def measures(link: Transform) -> bool:
    """Whether a link has a phase one."""
    return type(link).measure is not Transform.measure


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


def refresh(
    member: Member,
    bounds: Sequence[Bound],
    grads: Mapping[Member, Tensor],
    row: Mapping[str, Any],
    step: int,
    facts: dict[str, Any],
) -> None:
    """Run `refresh` of these links (or inner rules) of one member; of a layer, for its leader."""
    states, written, rested = Held(member, member.bound), set[str](), set[str]()
    for bound, unit in [(b, top.link.unit) for top in member.bound for b in top.family() if b in bounds]:
        if unit == "layer" and member.layer is not None and not member.layer.leads:
            continue
        env = Env(seen(unit, member, grads), seen(unit, member, None), states, row, written, rested=rested, **facts)
        bits = piece_noise(member, step) if unit == "piece" else noise([member], [step])
        env.bits = lambda salt, like=env.x, bits=bits: bits(salt, like)
        env.known = {**env.known, "param": bound.param, "step": step}
        bound.link.refresh(env.grad, env.view(bound), env.x, env.context(bound, env.grad, env.handles(bound)))
    keep_states(member, assigned(states, written - rested, states.before), step)
    for key in rested:
        member.stores[key].rest(member.state)


def seen(unit: str, member: Member, values: Mapping[Member, Tensor] | None) -> Tensor:
    """What a link of this unit sees of a member: of `values` (zeros where it has none), or of the weights."""

    def whole(m: Member) -> Tensor:
        if values is not None and m not in values:
            return torch.zeros(m.spec.shape, dtype=m.format.compute, device=m.device)
        piece = m.format.read(stored_weights(m)) if values is None else values[m].to(m.format.compute)
        return piece if unit == "piece" else shards.gather(m.tensor, piece)

    if unit == "layer":
        return joined(whole(member), member.spec, None if member.partner is None else whole(member.partner))
    return view_of(unit, member.spec, whole(member))


def measure_whole(
    position: int,
    members: Sequence[Member],
    us: Sequence[Tensor],
    grads: Sequence[Tensor],
    rows: Sequence[Mapping[str, Any]],
    steps: Sequence[int],
    clock: int,
    feeds: Sequence[Mapping[str, Tensor]],
) -> tuple[Columns, Tensor]:
    """Phase one of a link that sees whole parameters or pieces: what is measured, and the values (members, columns).

    A layer is measured once, with its leader, or with the only one of its two that has a gradient.
    """
    by_member, update = dict(zip(members, grads, strict=True)), dict(zip(members, us, strict=True))
    given = {name: {m: fed[name] for m, fed in zip(members, feeds, strict=True)} for name in feeds[0]}
    found: list[dict[str, Tensor]] = []
    for i, m in enumerate(members):
        lead = m if m.layer is None or m.layer.leads or m.partner is None else m.partner
        bound = lead.bound[position]
        unit = bound.link.unit
        if unit == "layer" and lead is not m and lead in by_member:
            found.append({})
            continue
        lead = lead if unit == "layer" else m
        bound, written = lead.bound[position], set[str]()
        states = Held(lead, [bound])
        fed = {name: seen(unit, lead, values) for name, values in given.items()}
        env = Env(seen(unit, lead, by_member), seen(unit, lead, None), states, rows[i], written, feeds=fed)
        env.known = {"param": bound.param, "step": steps[i], "clock": clock}
        bits = piece_noise(lead, steps[i]) if unit == "piece" else noise([lead], [steps[i]])
        env.bits = lambda salt, like=env.x, bits=bits: bits(salt, like)
        found.append(bound.link.measure(seen(unit, lead, update), env.view(bound), env.x, env.context(bound, env.grad)))
        keep_states(lead, assigned(states, written, states.before), steps[i])
    columns = Columns.of(next((values for values in found if values), {}))
    return columns, torch.stack([columns.row(values, members[0].device) for values in found])
