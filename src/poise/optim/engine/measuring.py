"""What links that see whole parameters do apart from updating: phase one, and the rare work of `refresh`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..transform import Transform
from . import shards
from .calls import Env
from .held import Held, assigned, keep_states, noise, piece_noise, stored_weights
from .layers import joined
from .links import Bound
from .measured import Columns
from .members import Member
from .views import view_of


def measures(link: Transform) -> bool:
    """Whether a link has a phase one."""
    return type(link).measure is not Transform.measure


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
        own = lead.fed_shapes
        fed = {name: values[lead] if name in own else seen(unit, lead, values) for name, values in given.items()}
        env = Env(seen(unit, lead, by_member), seen(unit, lead, None), states, rows[i], written, feeds=fed)
        env.known = {"param": bound.param, "step": steps[i], "clock": clock}
        bits = piece_noise(lead, steps[i]) if unit == "piece" else noise([lead], [steps[i]])
        env.bits = lambda salt, like=env.x, bits=bits: bits(salt, like)
        found.append(bound.link.measure(seen(unit, lead, update), env.view(bound), env.x, env.context(bound, env.grad)))
        keep_states(lead, assigned(states, written, states.before), steps[i])
    columns = Columns.of(next((values for values in found if values), {}))
    return columns, torch.stack([columns.row(values, members[0].device) for values in found])
