"""Links that see whole parameters: matrices (equal ones at once), tensors, layers, and pieces, which are all of it here.

A sharded parameter is gathered first, on every rank; what comes out, and the state, goes back to the shards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import shards
from .calls import Env, call_update
from .held import Held, assigned, keep_states, noise, piece_noise, stored_weights
from .layers import parted
from .measuring import measures, seen
from .members import Member
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
        fed = facts["feeds"]
        facts = {**facts, "feeds": {name: t if name in first.fed_shapes else together([t]) for name, t in fed.items()}}
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
            own = member.fed_shapes
            env.feeds = {name: t if name in own else view_of(unit, member.spec, t) for name, t in env.feeds.items()}
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
