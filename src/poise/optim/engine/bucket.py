"""Parameters that take the same way: one rule, one format, one device."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from poise.memory.matrix import MatrixCodec

from ..transform import Transform
from . import kernels, shards
from .flat import Flat, Mode
from .measured import Columns
from .measuring import measure_whole
from .members import LOW, Member
from .program import Program, reads_loss, reads_own
from .segments import cut
from .tiled import Tiled
from .whole import Whole


@dataclass
class Pass:
    """A bucket's members that take part in one step, and what is known of them."""

    members: list[Member]
    grads: list[Tensor]  # local, contiguous, in the parameter's dtype
    steps: list[int]
    rows: list[dict[str, Any]]  # distinct rows of scalars
    which: list[int]  # each member's row
    feeds: list[dict[str, Tensor]]  # of the same names for all of them
    us: list[Tensor] = field(default_factory=list)  # local, contiguous, in the computing dtype
    own: dict[str, tuple[Columns, Tensor]] = field(default_factory=dict)  # link prefix -> what was measured, (members, columns)
    segment: int = 0
    clock: int = 0  # steps of the rule

    @property
    def fed(self) -> tuple[str, ...]:
        """Names of the tensors that its members were fed."""
        return tuple(self.feeds[0])

    def pick(self, at: Sequence[int]) -> Pass:
        """The same for some of the members."""

        def some(values: list[Any]) -> list[Any]:
            return [values[i] for i in at] if values else []

        kept = sorted({self.which[i] for i in at})
        rows, which = [self.rows[w] for w in kept], [kept.index(self.which[i]) for i in at]
        own = {prefix: (columns, values[list(at)]) for prefix, (columns, values) in self.own.items()}
        return Pass(
            some(self.members),
            some(self.grads),
            some(self.steps),
            rows,
            which,
            some(self.feeds),
            some(self.us),
            own,
            self.segment,
            self.clock,
        )


class Bucket:
    """Members of one rule and device, run in one of the engine's modes ("tiles" or one of flat.Mode)."""

    def __init__(self, members: Sequence[Member], mode: str) -> None:
        self.members, self.mode = list(members), mode
        self.bound = members[0].bound
        self.links: tuple[Transform, ...] = tuple(b.link for b in self.bound)
        self.segments = cut(self.members)
        self.compute = members[0].format.compute
        self.device = members[0].device
        self.feeds = tuple(dict.fromkeys(name for link in self.links for name in link.feeds))
        self.may_feed = tuple(dict.fromkeys(name for link in self.links for name in link.may_feed))
        joint = next((link for link in self.links if link.unit == "layer"), None)
        if joint is not None and self.may_feed:
            name = self.may_feed[0]
            raise ValueError(f"{joint!r} sees a layer as one, and {name!r} might be given for a part of it: name it in `feeds`")
        self.mixed = len({m.signature() for m in members}) > 1  # parameters of one layer, kept in different formats
        self.runners: dict[Any, Tiled | Flat] = {}
        self.whole = {s.positions: Whole(s.positions) for s in self.segments if not s.tiled}
        self.scratch: dict[tuple[str, ...], Tensor] = {}  # by what its users were fed
        self.readers: dict[tuple[str, Any, tuple[str, ...]], bool] = {}  # what was found out of a link, by its prefix

    # -- one stretch --------------------------------------------------------------------------------------------------

    def runner(
        self,
        like: Member,
        positions: tuple[int, ...],
        names: tuple[str, ...],
        fed: tuple[str, ...],
        measuring: bool = False,
        dry: bool = False,
    ) -> Tiled | Flat:
        """Whatever runs these links for members of one signature: made once for each set of scalar and of fed names."""
        key = (like.signature() if self.mixed else None, positions, names, fed, measuring, dry)
        if key not in self.runners:
            ends = positions[-1] == len(self.bound) - 1 and not dry
            begins = positions[0] == 0 or (measuring and self.links[positions[0]].reads == "grad")
            listeners = tuple(b for b in like.bound if type(b.link).written is not Transform.written) if ends else ()
            bound = tuple(like.bound[i] for i in positions)
            program = Program(bound, begins, ends, names, measuring, fed, listeners)
            self.runners[key] = self._make(program, like)
        return self.runners[key]

    def _make(self, program: Program, like: Member) -> Tiled | Flat:
        here = program.blocked is None or like.tiled(program.blocked.prefix)
        seen_whole = any(isinstance(like.stores[key].codec, MatrixCodec) for key in program.keys)
        gridded = program.ends and like.format.grid is not None
        if self.mode == "tiles" and (seen_whole or (gridded and not (program.blocked is None and like.rounds_in_tiles()))):
            return Flat(program, like, "chunks")  # what is stored has scales of rows and columns, which no tile knows
        if self.mode == "tiles" and here:
            try:
                return Tiled(program, like)
            except kernels.Unsupported as error:
                say_once(f"poise: this rule runs through torch.compile, not as native tiles: {error}")
                self.mode = "inductor" if kernels.compiler() else "chunks"
        return Flat(program, like, "eager" if self.mode == "tiles" else self.mode)  # type: ignore[arg-type]

    def measure(self, p: Pass, position: int, us: Sequence[Tensor]) -> tuple[Columns, Tensor]:
        """Phase one of one link over the members of a pass: what is measured, and the values (members, columns)."""
        if self.bound[position].link.unit not in ("element", "block"):
            rows = [p.rows[w] for w in p.which]
            return measure_whole(position, p.members, us, p.grads, rows, p.steps, p.clock, p.feeds)
        begins = position == 0 or self.links[position].reads == "grad"
        given = Pass(p.members, p.grads, p.steps, p.rows, p.which, p.feeds, [] if begins else list(us))
        return self._run((position,), given, {}, {}, measuring=True)

    def advance(
        self,
        p: Pass,
        totals: Mapping[int, Mapping[str, Any]],
        loss: Tensor | None,
        capture: dict[Member, Tensor] | None,
    ) -> None:
        """Run the next stretch of a pass; `totals` are by identity of the link."""
        segment = self.segments[p.segment]
        p.segment += 1
        by_prefix = {b.prefix: self._here(totals[id(b.link)]) for b in self.bound if id(b.link) in totals}
        if not segment.tiled:

            def facts(i: int) -> dict[str, Any]:
                own = {prefix: columns.apart(values[i]) for prefix, (columns, values) in p.own.items()}
                return {"totals": by_prefix, "own": own, "feeds": p.feeds[i], "known": {"clock": p.clock, "loss": loss}}

            incoming = p.us or [g.to(self.compute) for g in p.grads]
            p.us = self.whole[segment.positions].run(p.members, incoming, p.grads, p.rows, p.which, p.steps, facts)
            return
        dry = capture is not None and p.segment == len(self.segments)
        prefixes = {self.bound[i].prefix for i in segment.positions}
        totals_here = {f"total:{b}/{n}": v for b, values in by_prefix.items() if b in prefixes for n, v in values.items()}
        own_here = {
            prefix: found
            for prefix, found in p.own.items()
            if prefix in prefixes and self._reads(reads_own, prefix, tuple(found[0]), p, by_prefix.get(prefix, {}))
        }
        if loss is not None:
            for prefix in prefixes:
                names = tuple(p.own[prefix][0]) if prefix in p.own else ()
                if self._reads(reads_loss, prefix, names, p, by_prefix.get(prefix, {})):
                    totals_here["loss"] = float(loss)
        ends = p.segment == len(self.segments) and not dry
        if not ends and (segment.positions[0] == 0 or not p.us):
            p.us = self._temporaries(p)
        self._run(segment.positions, p, totals_here, own_here, dry=dry)
        if dry:
            assert capture is not None
            capture.update({m: u.reshape(m.rank_shape).clone() for m, u in zip(p.members, p.us, strict=True)})

    def _here(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Totals on this bucket's device: a link may stand over parameters on several."""
        return {name: v.to(self.device) if isinstance(v, Tensor) else v for name, v in values.items()}

    def _reads(self, question: Any, prefix: str, names: tuple[str, ...], p: Pass, total: Mapping[str, Any]) -> bool:
        """Whether a link's update looks at `k.own` (else all may share one row) or at `k.loss`, asked once."""
        key = (prefix, question, p.fed)
        if key not in self.readers:
            bound = next(b for b in self.bound if b.prefix == prefix)
            self.readers[key] = question(bound, names, p.fed, p.rows[0], total)
        return self.readers[key]

    def _table(
        self,
        p: Pass,
        positions: Sequence[int],
        totals: Mapping[str, Any],
        own: Mapping[str, tuple[Columns, Tensor]],
    ) -> tuple[list[list[Any]], list[int], tuple[str, ...]]:
        """Rows of scalars for these links: one for each distinct row, or for each member where values are its own."""
        prefixes = tuple(self.bound[i].prefix for i in positions)
        rows = [{n: v for n, v in row.items() if n.startswith(prefixes)} | dict(totals) for row in p.rows]
        names = tuple(rows[0])
        if not own:
            return [list(row.values()) for row in rows], p.which, names
        table = [list(rows[w].values()) for w in p.which]
        for prefix, (measured, values) in own.items():
            names += tuple(f"own:{prefix}/{n}" for n in measured)
            table = [
                [*row, *mine]
                for row, mine in zip(table, values.tolist() if values.device.type == "cpu" else values, strict=True)
            ]
        return table, list(range(len(table))), names

    def _temporaries(self, p: Pass) -> list[Tensor]:
        """Space for the update on its way from one stretch to the next, equal matrices side by side."""
        sizes = [m.local.numel() for m in p.members]
        held = self.scratch.get(p.fed)  # passes that were fed other tensors may wait for each other
        if held is None or held.numel() < sum(sizes):
            held = self.scratch[p.fed] = torch.empty(sum(sizes), dtype=self.compute, device=self.device)
        pieces = held[: sum(sizes)].split(sizes)
        return [piece.view(m.rank_shape) for piece, m in zip(pieces, p.members, strict=True)]

    def _run(
        self,
        positions: tuple[int, ...],
        p: Pass,
        totals: Mapping[str, Any],
        own: Mapping[str, tuple[Columns, Tensor]],
        measuring: bool = False,
        dry: bool = False,
    ) -> tuple[Columns, Tensor]:
        """Run element and block links over a pass; their measured sums, (members, columns)."""
        run = self._run_mixed if self.mixed else self._run_one
        return run(positions, p, totals, own, measuring, dry)

    def _run_one(
        self,
        positions: tuple[int, ...],
        p: Pass,
        totals: Mapping[str, Any],
        own: Mapping[str, tuple[Columns, Tensor]],
        measuring: bool,
        dry: bool,
    ) -> tuple[Columns, Tensor]:
        table, which, names = self._table(p, positions, totals, own)
        runner = self.runner(p.members[0], positions, names, p.fed, measuring, dry)
        if isinstance(runner, Flat):
            inputs = []
            for i in range(len(p.members)):
                given = {"g": p.grads[i]} | ({"u": p.us[i]} if p.us else {})
                inputs.append(given | {f"feed:{name}": t for name, t in p.feeds[i].items()})
            sums = runner.run(p.members, inputs, table, which, p.steps)
        else:
            sums = self._run_tiles(runner, p, table, which)
        return Columns.numbers(name.rpartition("/")[2] for name in runner.sums), torch.as_tensor(sums)

    def _run_mixed(self, positions: tuple[int, ...], p: Pass, *given: Any) -> tuple[Columns, Tensor]:
        """The same for members of several signatures, one signature after another."""
        totals, own, measuring, dry = given
        kinds: dict[Any, list[int]] = {}
        for i, m in enumerate(p.members):
            kinds.setdefault(m.signature(), []).append(i)
        found = []
        for at in kinds.values():
            mine = {prefix: (names, values[at]) for prefix, (names, values) in own.items()}
            found.append((at, *self._run_one(positions, p.pick(at), totals, mine, measuring, dry)))
        sums = found[0][2].new_zeros(len(p.members), found[0][2].shape[1])
        for at, _, values in found:
            sums[at] = values
        return found[0][1], sums

    def _run_tiles(self, runner: Tiled, p: Pass, table: list[list[Any]], which: list[int]) -> Any:
        staged: list[tuple[Member, Tensor]] = []
        xs = []
        for m in p.members:
            x = shards.local(m.tensor)
            if not x.is_contiguous():  # kept where it is, worked on in logical order
                x = x.detach().contiguous()
                staged.append((m, x))
            xs.append(x.data_ptr())
        pointers: dict[str, list[int]] = {"g": [g.data_ptr() for g in p.grads], "x": xs}
        if p.us:
            pointers["u"] = [u.data_ptr() for u in p.us]
        for name in p.fed:
            pointers[f"feed:{name}"] = [f[name].data_ptr() for f in p.feeds]
        sums = runner.run(p.members, pointers, table, which, p.steps)
        if runner.program.ends and not runner.program.measures:
            for m, x in staged:
                m.local.copy_(x)
        return sums


_said: set[str] = set()


def say_once(message: str) -> None:
    """Warn, the first time in this process."""
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=2)


__all__ = ["LOW", "Bucket", "Mode", "Pass"]
