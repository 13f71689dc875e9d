"""One step of an optimizer, over all its buckets.

The order of a step, for everyone: `refresh` where it is due; phase one of every link that measures the raw gradient; their
totals over all parameters and ranks, reduced once per link; then each bucket's chain, stretch by stretch, stopping where a
link measures the update until all buckets that hold that link have measured it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..transform import Chain, Context, Transform
from . import kernels, shards
from .bucket import Bucket, Pass, say_once
from .links import Bound, StateView
from .members import Member
from .whole import measures, refresh

# Elements whose updates are held at once between the stretches of a chain with matrix rules in it.
HELD = 1 << 24


class Engine:
    """Runs a fixed set of members. Made anew when parameters are added, moved or change their dtype."""

    def __init__(self, members: Sequence[Member], backend: str) -> None:
        self.members = list(members)
        # one vector of step counts; each parameter's "step" is a view into it
        self.steps = torch.tensor([int(m.state["step"]) for m in members], dtype=torch.int64)
        self.counts = self.steps.numpy()
        self.views = list(self.steps.unbind(0))
        for m, view in zip(members, self.views, strict=True):
            m.state["step"] = view
        self.position = {m: i for i, m in enumerate(members)}
        self.buckets = self._buckets(backend)
        self.reference: list[Bucket] | None = None
        self.scopes = self._scopes()
        early = [(link, held) for link, held in self.scopes.values() if measures(link) and link.reads == "grad"]
        self.stateless = [link for link, held in early if not any(b.slots for _, b in held)]
        self.stateful = [link for link, held in early if any(b.slots for _, b in held)]
        family = (one.link for held in self.scopes.values() for _, b in held[1][:1] for one in b.family())
        self.needing_loss = next((link for link in family if link.needs_loss), None)
        self.refreshing = any(_due_ever(b) for m in self.members for b in m.bound)
        self.groups: dict[int, list[dict[str, Any]]] = {}
        for m in members:
            held_groups = self.groups.setdefault(id(m.rule), [])
            if not any(m.group is group for group in held_groups):
                held_groups.append(m.group)

    def stale(self) -> bool:
        """Whether a parameter has changed its dtype, device or shape since this engine was made."""
        for m in self.members:
            t = shards.local(m.tensor)
            if t.dtype is not m.format.dtype or t.device != m.device or t.shape != m.local_shape:
                return True
        return False

    def _buckets(self, backend: str) -> list[Bucket]:
        found: dict[Any, list[Member]] = {}
        held: dict[Any, int] = {}
        for m in self.members:
            key: Any = (id(m.rule), m.signature())
            units = {link.unit for link in m.rule}
            if (
                units & {"matrix", "tensor"}
                and "layer" not in units
                and not any(measures(k) and k.reads == "update" for k in m.rule)
            ):
                # equal shapes together, and no more of them than may be held at once
                shaped = (key, tuple(m.spec.shape), m.spec.role == "experts", m.spec.splits)
                size = max(m.spec.shape.numel(), 1)
                held[shaped] = held.get(shaped, -1) + 1
                key = (*shaped, held[shaped] // max(HELD // size, 1))
            elif "layer" in units:
                key = (id(m.rule), m.device)  # the two parameters of a layer go together, however each is kept
            found.setdefault(key, []).append(m)
        return [Bucket(members, mode_for(members[0].device, backend)) for members in found.values()]

    def _scopes(self) -> dict[int, tuple[Transform, list[tuple[Member, Bound]]]]:
        """Every link by identity, with all members that hold it."""
        scopes: dict[int, tuple[Transform, list[tuple[Member, Bound]]]] = {}
        for m in self.members:
            for b in m.bound:
                scopes.setdefault(id(b.link), (b.link, []))[1].append((m, b))
        return scopes

    # -- one step -----------------------------------------------------------------------------------------------------

    def step(
        self, feeds: Mapping[str, Mapping[int, Tensor]], loss: Tensor | None = None, capture: dict[Member, Tensor] | None = None
    ) -> bool:
        """Take one step with the gradients that stand in the parameters; False if a link abandoned it.

        With `capture`, the displacement of every parameter is put there and the weights are left alone (state is not). A loss
        that a link needs and nobody gave counts as 1 then.
        """
        if loss is None and self.needing_loss is not None:
            if capture is None:
                raise RuntimeError(f"{self.needing_loss!r} needs the loss: call step(closure) with a closure that returns it")
            loss = torch.ones(())
        buckets = self.buckets
        if capture is not None:
            self.reference = self.reference or self._buckets("eager")
            buckets = self.reference
        passes = [(bucket, p) for bucket in buckets if (p := self._start(bucket, feeds)) is not None]
        if not passes:
            return True
        passes = self._tick(passes)
        totals: dict[int, dict[str, Any]] = {}
        try:
            for link in self.stateless:  # they may abandon the step, so they come before anything is written
                totals[id(link)] = self._reduce(link, passes, loss)
                if bool(totals[id(link)].pop("skip", False)):
                    self._untick(passes)
                    return False
        except Exception:
            self._untick(passes)
            raise
        if self.refreshing:
            self._refresh(passes, loss)
        for link in self.stateful:
            totals[id(link)] = self._reduce(link, passes, loss)
        waiting = [(bucket, p) for bucket, p in passes if not p.rows[0].get("gathers")]
        while waiting:
            moved = False
            for bucket, p in list(waiting):
                while p.segment < len(bucket.segments):
                    segment = bucket.segments[p.segment]
                    if segment.gated and id(bucket.links[segment.positions[0]]) not in totals:
                        break
                    bucket.advance(p, totals, loss, capture)
                    moved = True
                else:
                    waiting.remove((bucket, p))
            for link in self._ready(waiting):
                totals[id(link)] = self._reduce(link, waiting, loss)
                moved = True
            if waiting and not moved:
                raise ValueError("two rules measure the same two links in opposite orders; give one of them links of its own")
        return True

    def _start(self, bucket: Bucket, feeds: Mapping[str, Mapping[int, Tensor]]) -> Pass | None:
        """The members of a bucket that have a gradient, with this step's scalars."""
        members: list[Member] = []
        grads: list[Tensor] = []
        for m in bucket.members:
            grad = m.tensor.grad
            if grad is not None:
                members.append(m)
                grads.append(usable(m, grad))
        if not members:
            return None
        fed = [_fed(bucket, m, feeds) for m in members]
        return Pass(members, grads, [], [], [], fed)

    def _tick(self, passes: Sequence[tuple[Bucket, Pass]]) -> list[tuple[Bucket, Pass]]:
        """Count this step, and compute its scalars: one row for each distinct (group, step count).

        Members whose rule only gathers in this step get passes of their own.
        """
        ticked: list[tuple[Bucket, Pass]] = []
        clocks = {
            rule: max(group["clock"] for group in self.groups[rule]) + 1 for rule in {id(p.members[0].rule) for _, p in passes}
        }
        for rule, clock in clocks.items():
            for group in self.groups[rule]:
                group["clock"] = clock
        for bucket, p in passes:
            at = [self.position[m] for m in p.members]
            for i, m in zip(at, p.members, strict=True):
                if m.state["step"] is not self.views[i]:  # the user has put another count in its place
                    self.counts[i] = int(m.state["step"])
                    m.state["step"] = self.views[i]
            self.counts[at] += 1
            p.steps, p.clock = self.counts[at].tolist(), clocks[id(p.members[0].rule)]
            known: dict[tuple[int, int, float], int] = {}
            for m, step in zip(p.members, p.steps, strict=True):
                key = (id(m.group), step, m.scale)
                if key not in known:
                    known[key] = len(p.rows)
                    p.rows.append(_row(m, step))
                p.which.append(known[key])
            if any("gathers" in row for row in p.rows):
                for gathers in (False, True):
                    some = [i for i, w in enumerate(p.which) if ("gathers" in p.rows[w]) == gathers]
                    ticked += [(bucket, p.pick(some))] if some else []
            else:
                ticked.append((bucket, p))
        return ticked

    def _untick(self, passes: Sequence[tuple[Bucket, Pass]]) -> None:
        for _, p in passes:
            self.counts[[self.position[m] for m in p.members]] -= 1
        for rule in {id(p.members[0].rule) for _, p in passes}:
            for group in self.groups[rule]:
                group["clock"] -= 1

    def _refresh(self, passes: Sequence[tuple[Bucket, Pass]], loss: Tensor | None) -> None:
        for _, p in passes:
            grads = dict(zip(p.members, p.grads, strict=True))
            for i, m in enumerate(p.members):
                lead = m if m.layer is None or m.layer.leads or m.partner is None or m.partner in grads else m.partner
                # a weight without a gradient is refreshed for its bias, but only what sees the two as one
                outers = [b for b in lead.bound if lead is m or b.link.unit == "layer"]
                due = [b for outer in outers for b in outer.family() if b.due(p.steps[i])]
                if due:
                    facts = {"feeds": p.feeds[i], "known": {"clock": p.clock, "loss": loss}}
                    refresh(lead, due, grads, p.rows[p.which[i]], p.steps[i], facts)

    # -- totals -------------------------------------------------------------------------------------------------------

    def _ready(self, waiting: Sequence[tuple[Bucket, Pass]]) -> list[Transform]:
        """Links that every bucket holding them now waits at."""
        at = [(bucket, bucket.links[bucket.segments[p.segment].positions[0]]) for bucket, p in waiting]
        links = {id(link): link for _, link in at}
        return [
            link for link in links.values() if all(here is link for bucket, here in at if any(link is k for k in bucket.links))
        ]

    def _reduce(
        self,
        link: Transform,
        passes: Sequence[tuple[Bucket, Pass]],
        loss: Tensor | None,
    ) -> dict[str, Any]:
        """Phase one of `link` over all its members, added up, and its reduce()."""
        found: list[tuple[Bucket, Pass, int, tuple[str, ...], Tensor]] = []
        for bucket, p in passes:
            for position, held_link in enumerate(bucket.links):
                if held_link is link:
                    names, values = bucket.measure(p, position, (p.us or p.grads) if link.reads == "update" else p.grads)
                    found.append((bucket, p, position, names, values))
        if not found:
            return {}
        counted = [(p.members, values) for _, p, _, _, values in found]
        if link.absent == "zeros":
            counted += self._absent(link, passes)
        if link.unit in ("element", "block"):
            _over_ranks(link, counted)
        where = found[0][4].device  # of the totals, should the members be on several
        sums = torch.stack([values.sum(0).to(where) for _, values in counted]).sum(0)
        totals = dict(zip(found[0][3], sums.unbind(0), strict=True))
        each = torch.cat([values[_counting(link, members)].to(where) for members, values in counted])
        for bucket, p, position, names, values in found:
            p.own[bucket.bound[position].prefix] = (names, values)
        bucket, p, position, _, _ = found[0]
        member, bound, i = p.members[0], bucket.bound[position], 0
        holder, at = self.scopes[id(link)][1][0]  # shared slots are kept with the first member that holds the link
        written: set[str] = set()
        view = StateView({key: holder.state[key] for key in at.shared.values()}, at.shared, written)
        row = {n.removeprefix(bound.prefix): v for n, v in p.rows[p.which[i]].items() if n.startswith(bound.prefix)}
        k = Context(
            row, total=totals, own={}, loss=loss, step=p.steps[i], clock=p.clock, param=member.spec, inner=(), grad=p.grads[i],
            each=dict(zip(found[0][3], each.unbind(1), strict=True)),
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
                    steps = [int(self.counts[self.position[m]]) + 1 for m in absent]
                    rows = [_row(m, s) for m, s in zip(absent, steps, strict=True)]
                    p = Pass(absent, zeros, steps, rows, list(range(len(absent))), [{} for _ in absent])
                    held = [
                        {key: shards.local(t).clone() for key, t in m.state.items()} if m.bound[position].slots else {}
                        for m in absent
                    ]
                    counted.append((absent, bucket.measure(p, position, zeros)[1]))
                    for m, kept in zip(absent, held, strict=True):  # it is counted, but it takes no step
                        for key, value in kept.items():
                            shards.local(m.state[key]).copy_(value)
        return counted


def mode_for(device: torch.device, backend: str) -> str:
    """How rules are run on a device."""
    if backend != "auto":
        if backend not in ("tiles", "inductor", "chunks", "eager"):
            raise ValueError(f"backend={backend!r}: must be 'auto', 'tiles', 'inductor', 'chunks' or 'eager'")
        return backend
    if device.type == "cpu":
        if kernels.compiler() is not None:
            return "tiles"
        say_once(
            "poise: no C++ compiler found (CXX, g++, clang++, c++), so rules run piece by piece at about a third of the speed"
        )
        return "chunks"
    if device.type == "meta":
        return "eager"
    if device.type == "cuda" and (lacking := triton_lacks(device)) is not None:
        say_once(f"poise: {lacking}, so rules run operation by operation, at a fraction of the speed")
        return "eager"
    return "inductor"


def triton_lacks(device: torch.device) -> str | None:
    """What keeps torch.compile from this GPU, of NVIDIA or AMD; None if nothing does."""
    if importlib.util.find_spec("triton") is None:
        return "no Triton found, which torch.compile needs on a GPU"
    if "CC" not in os.environ and not any(map(shutil.which, ("gcc", "clang", "cc"))):
        return "no C compiler found (CC, gcc, clang), which Triton needs"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (7, 0):
        return f"{torch.cuda.get_device_name(device)} is older than Triton supports (compute capability 7.0)"
    return None


def usable(m: Member, grad: Tensor) -> Tensor:
    """This rank's gradient, contiguous and in the parameter's dtype; a clear error for what cannot be used."""
    if grad.layout is not torch.strided:
        raise ValueError(
            f"parameter {m.spec.name!r} has a sparse gradient ({grad.layout}); poise's rules are dense: "
            "use sparse=False in the embedding, or grad.to_dense()"
        )
    grad = shards.local(grad)
    if grad.dtype is not m.tensor.dtype:
        if grad.is_complex():
            raise TypeError(f"parameter {m.spec.name!r} has a complex gradient; optimize torch.view_as_real of it")
        grad = grad.to(m.tensor.dtype)
    return grad if grad.is_contiguous() else grad.contiguous()


def _row(m: Member, step: int) -> dict[str, Any]:
    row: dict[str, Any] = {}
    hyper = m.group if m.scale == 1.0 else {**m.group, "update_scale": m.scale}
    for bound in m.bound:
        scalars = bound.scalars(step, hyper)
        if scalars is None:
            row["gathers"] = True
        else:
            row.update(scalars)
    return row


def _fed(bucket: Bucket, m: Member, feeds: Mapping[str, Mapping[int, Tensor]]) -> dict[str, Tensor]:
    fed: dict[str, Tensor] = {}
    for name in bucket.feeds:
        if id(m.tensor) not in feeds.get(name, {}):
            raise RuntimeError(
                f"{m.rule!r} needs {name!r} for parameter {m.spec.name!r}: call opt.feed({name}=...) before step()"
            )
        fed[name] = shards.local(feeds[name][id(m.tensor)]).to(m.format.compute).contiguous()
    return fed


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


def _due_ever(bound: Bound) -> bool:
    return any(b.link.every > 0 or type(b.link).due is not Transform.due for b in bound.family())


def chain_of(rule: Transform) -> Chain:
    """A rule as a chain."""
    return rule if isinstance(rule, Chain) else Chain((rule,))


__all__ = ["Engine", "usable"]
