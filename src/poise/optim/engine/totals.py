"""What links measure, added up over parameters and ranks, and reduced once for each link."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..transform import Context, Transform
from . import shards
from .bucket import Bucket, Pass
from .calls import StateView
from .links import Bound
from .measured import Columns
from .members import Member


class Totals:
    """Phase one of the links that have one.

    Args:
        holders: by identity of a link, where the slots are that its parameters share.
        stateless: those that measure the raw gradient and keep no state; only they may abandon a step.
        next_step: the count of a parameter's next step.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        holders: Mapping[int, tuple[Member, Bound]],
        stateless: Sequence[Transform],
        next_step: Callable[[Member], int],
    ) -> None:
        self.buckets, self.holders, self.stateless, self.next_step = buckets, holders, stateless, next_step

    def ready(self, waiting: Sequence[tuple[Bucket, Pass]]) -> list[Transform]:
        """Links that every bucket holding them now waits at."""
        at = [(bucket, bucket.links[bucket.segments[p.segment].positions[0]]) for bucket, p in waiting]
        links = {id(link): link for _, link in at}
        return [
            link for link in links.values() if all(here is link for bucket, here in at if any(link is k for k in bucket.links))
        ]

    def reduce(
        self,
        link: Transform,
        passes: Sequence[tuple[Bucket, Pass]],
        loss: Tensor | None,
    ) -> dict[str, Any]:
        """Phase one of `link` over all its members, added up, and its reduce()."""
        found: list[tuple[Bucket, Pass, int, Columns, Tensor]] = []
        for bucket, p in passes:
            for position, held_link in enumerate(bucket.links):
                if held_link is link:
                    columns, values = bucket.measure(p, position, (p.us or p.grads) if link.reads == "update" else p.grads)
                    found.append((bucket, p, position, columns, values))
        if not found:
            return {}
        counted = [(p.members, values) for _, p, _, _, values in found]
        if link.absent == "zeros":
            counted += self._absent(link, passes)
        if link.unit in ("element", "block", "piece"):
            _over_ranks(link, counted)
        where = found[0][4].device  # of the totals, should the members be on several
        sums = torch.stack([values.sum(0).to(where) for _, values in counted]).sum(0)
        columns = found[0][3]
        totals = columns.apart(sums)
        each = torch.cat([values[_counting(link, members)].to(where) for members, values in counted])
        for bucket, p, position, measured, values in found:
            p.own[bucket.bound[position].prefix] = (measured, values)
        bucket, p, position, _, _ = found[0]
        member, bound, i = p.members[0], bucket.bound[position], 0
        holder, at = self.holders.get(id(link), (member, bound))
        written: set[str] = set()
        view = StateView({key: holder.state[key] for key in at.shared.values()}, at.shared, written)
        row = {n.removeprefix(bound.prefix): v for n, v in p.rows[p.which[i]].items() if n.startswith(bound.prefix)}
        k = Context(
            row, total=totals, own={}, loss=loss, step=p.steps[i], clock=p.clock, param=member.spec, inner=(), grad=p.grads[i],
            each=columns.apart(each),
        )  # fmt: skip
        reduced = link.reduce(totals, view, k)
        if "skip" in reduced and link not in self.stateless:
            raise ValueError(
                f"{link!r}: only a link that measures the raw gradient and keeps no state of its own may return 'skip'"
            )
        for name, key in at.shared.items():
            if key in written:
                holder.state[key].copy_(view[name])
        return reduced

    def _absent(self, link: Transform, passes: Sequence[tuple[Bucket, Pass]]) -> list[tuple[list[Member], Tensor]]:
        """Members without gradient, measured as having a gradient of zeros."""
        present = {id(m.tensor) for _, p in passes for m in p.members}
        counted: list[tuple[list[Member], Tensor]] = []
        for bucket in self.buckets:
            absent = [m for m in bucket.members if id(m.tensor) not in present]
            for position, held_link in enumerate(bucket.links):
                if held_link is link and absent:
                    zeros = [torch.zeros(m.rank_shape, dtype=m.format.dtype, device=m.local.device) for m in absent]
                    steps = [self.next_step(m) for m in absent]
                    rows = [m.row(s) for m, s in zip(absent, steps, strict=True)]
                    fed: list[dict[str, Tensor]] = [{} for _ in absent]
                    p = Pass(absent, zeros, steps, rows, list(range(len(absent))), fed, clock=passes[0][1].clock)
                    held = [
                        {key: shards.local(t).clone() for key, t in m.state.items()} if m.bound[position].slots else {}
                        for m in absent
                    ]
                    counted.append((absent, bucket.measure(p, position, zeros)[1]))
                    for m, kept in zip(absent, held, strict=True):  # it is counted, but it takes no step
                        for key, value in kept.items():
                            shards.local(m.state[key]).copy_(value)
        return counted


def holders(members: Iterable[Member]) -> dict[int, tuple[Member, Bound]]:
    """By identity of every link that shares slots, the member that holds them: the first, whatever becomes of it."""
    found: dict[int, tuple[Member, Bound]] = {}
    for m in members:
        for b in m.bound:
            if b.shared:
                found.setdefault(id(b.link), (m, b))
    return found


def _over_ranks(link: Transform, counted: Sequence[tuple[Sequence[Member], Tensor]]) -> None:
    """Add up what the ranks measured of their pieces, in place, with one all-reduce for each group of ranks."""
    at: dict[tuple[Any, ...], list[tuple[Tensor, int]]] = {}
    for members, values in counted:
        for i, m in enumerate(members):
            if over := m.groups(link):
                at.setdefault(over, []).append((values, i))
    for over, entries in at.items():
        together = shards.add_up(torch.stack([values[i] for values, i in entries]), over)
        for (values, i), summed in zip(entries, together, strict=True):
            values[i] = summed


def _counting(link: Transform, members: Sequence[Member]) -> list[int] | slice:
    """Places of the members that were measured; of a layer with two parameters, only one is."""
    if link.unit != "layer":
        return slice(None)
    here = set(members)
    return [i for i, m in enumerate(members) if m.layer is None or m.layer.leads or m.partner not in here]
