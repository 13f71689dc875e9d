"""One step of an optimizer, over all its buckets.

The order of a step, for everyone: `refresh` where it is due; phase one of every link that measures the raw gradient; their
totals over all parameters and ranks, reduced once per link; then each bucket's chain, stretch by stretch, stopping where a
link measures the update until all buckets that hold that link have measured it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..transform import Chain, Transform
from . import shards
from .backends import mode_for
from .bucket import Bucket, Pass
from .links import Bound
from .measuring import measures, refresh
from .members import Member
from .totals import Totals, holders

# Elements whose updates are held at once between the stretches of a chain with matrix rules in it.
HELD = 1 << 24


class Engine:
    """Runs a fixed set of members. Made anew when parameters are added, moved, change their dtype, or need state at last."""

    def __init__(self, members: Sequence[Member], backend: str) -> None:
        self.everyone = list(members)
        self.members = members = [m for m in members if m.awake]
        self.asleep = [m for m in self.everyone if not m.awake]
        # one vector of step counts; each parameter's "step" is a view into it
        self.steps = torch.tensor([int(m.state["step"]) for m in members], dtype=torch.int64)
        self.counts = self.steps.numpy()
        self.views = list(self.steps.unbind(0))
        for m, view in zip(members, self.views, strict=True):
            m.state["step"] = view
        self.position = {m: i for i, m in enumerate(members)}
        self.buckets = self._buckets(backend)
        self.reference: list[Bucket] | None = None
        scopes = self._scopes()
        early = [(link, held) for link, held in scopes.values() if measures(link) and link.reads == "grad"]
        self.stateless = [link for link, held in early if not any(b.slots for _, b in held)]
        self.stateful = [link for link, held in early if any(b.slots for _, b in held)]
        self.totals = Totals(
            self.buckets, holders(self.everyone), self.stateless, lambda m: int(self.counts[self.position[m]]) + 1
        )
        family = (one.link for held in scopes.values() for _, b in held[1][:1] for one in b.family())
        self.needing_loss = next((link for link in family if link.needs_loss), None)
        self.refreshing = any(_due_ever(b) for m in self.members for b in m.bound)
        self.groups: dict[int, list[dict[str, Any]]] = {}
        for m in members:
            held_groups = self.groups.setdefault(id(m.rule), [])
            if not any(m.group is group for group in held_groups):
                held_groups.append(m.group)

    def stale(self) -> bool:
        """Whether a parameter has changed its dtype, device or shape, or came to need state, since this engine was made."""
        if any(m.wanted for m in self.asleep):
            return True
        for m in self.everyone:
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
                totals[id(link)] = self.totals.reduce(link, passes, loss)
                if bool(totals[id(link)].pop("skip", False)):
                    self._untick(passes)
                    return False
        except Exception:
            self._untick(passes)
            raise
        if self.refreshing:
            self._refresh(passes, loss)
        for link in self.stateful:
            totals[id(link)] = self.totals.reduce(link, passes, loss)
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
            for link in self.totals.ready(waiting):
                totals[id(link)] = self.totals.reduce(link, waiting, loss)
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

        Members whose rule only gathers in this step, or that were fed other tensors, get passes of their own.
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
                    p.rows.append(m.row(step))
                p.which.append(known[key])
            if bucket.may_feed or any("gathers" in row for row in p.rows):
                kinds: dict[tuple[bool, tuple[str, ...]], list[int]] = {}
                for i, w in enumerate(p.which):
                    kinds.setdefault(("gathers" in p.rows[w], tuple(p.feeds[i])), []).append(i)
                ticked += [(bucket, p.pick(kinds[kind]) if len(kinds) > 1 else p) for kind in sorted(kinds)]
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


def _fed(bucket: Bucket, m: Member, feeds: Mapping[str, Mapping[int, Tensor]]) -> dict[str, Tensor]:
    fed: dict[str, Tensor] = {}
    for name in (*bucket.feeds, *bucket.may_feed):
        if id(m.tensor) not in feeds.get(name, {}):
            if name not in bucket.feeds:
                continue
            hint = next((f", or {link.fed_by}" for link in m.rule if name in link.feeds and link.fed_by), "")
            raise RuntimeError(
                f"{m.rule!r} needs {name!r} for parameter {m.spec.name!r}: call opt.feed({name}=...) before step(){hint}"
            )
        fed[name] = shards.local(feeds[name][id(m.tensor)]).to(m.format.compute).contiguous()
    return fed


def _due_ever(bound: Bound) -> bool:
    return any(b.link.every > 0 or type(b.link).due is not Transform.due for b in bound.family())


def chain_of(rule: Transform) -> Chain:
    """A rule as a chain."""
    return rule if isinstance(rule, Chain) else Chain((rule,))


__all__ = ["Engine", "usable"]
