"""Runs a program parameter by parameter: with plain torch, with `torch.compile`, or in pieces where there is no compiler.

This is the path of GPUs and of machines without a C++ compiler, and the yardstick that compiled tiles are tested against.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from poise.memory.rounding import int32

from . import chunks, shards
from .blocks import Layout
from .calls import settled
from .members import LOW, SALT_WEIGHTS, Member, state_draw
from .program import Program

Mode = Literal["eager", "inductor", "chunks"]


class Flat:
    """A program for members of one signature."""

    def __init__(self, program: Program, like: Member, mode: Mode) -> None:
        self.program, self.mode, self.like = program, mode, like
        self.written = program.results()
        self.sums = [name for name in self.written if "/" in name]
        self.told = program.told if program.ends and not program.measures and like.format.mode != "plain" else None
        self.blocked = program.blocked.prefix if program.blocked is not None else None
        pieced = mode == "chunks" and not program.measures and self.blocked is None
        self.pieces = chunks.Pieces(program, like.format.compute) if pieced else None
        self.compiled: Callable[..., dict[str, Tensor]] | None = None
        if mode == "inductor":
            # one function for all parameters of the bucket: sizes are dynamic, scalars are a tensor, so nothing recompiles
            self.compiled = torch.compile(_own_code(program.plain), dynamic=True, fullgraph=True)

    def run(
        self,
        members: Sequence[Member],
        inputs: Sequence[Mapping[str, Tensor]],
        rows: Sequence[Sequence[float]],
        which: Sequence[int],
        steps: Sequence[int],
    ) -> np.ndarray | Tensor:
        """One step; `inputs` holds "g" and, where used, "u" and feeds, in local shape. "u" is overwritten by the result.

        Returns measured sums, (members, sums).
        """
        compute, device = self.like.format.compute, self.like.local.device
        table = torch.tensor(rows, dtype=compute).to(device, non_blocking=True) if len(self.program.names) else None
        sums = []
        for member, given, index, step in zip(members, inputs, which, steps, strict=True):
            row = torch.zeros(0, dtype=compute, device=device) if table is None else table[index]
            sums.append(self._one(member, given, row, rows[index], step))
        if not self.sums:
            return np.zeros((len(members), 0))
        return torch.stack(sums)

    def _one(self, member: Member, given: Mapping[str, Tensor], row: Tensor, numbers: Sequence[float], step: int) -> Tensor:
        fmt, state = member.format, member.state
        if self.blocked is not None and not member.layouts[self.blocked].runs:
            return row.new_zeros(len(self.sums), dtype=torch.float64)  # no element here, nor on a rank that waits for this one
        tensors = {name: t.reshape(-1).to(fmt.compute) for name, t in given.items() if name != "u" or not self.program.begins}
        stored = {"x": member.local}
        if LOW in state:
            stored[LOW] = shards.local(state[LOW])
        tensors["x"] = fmt.read(stored).reshape(-1)
        if self.told is not None and self.pieces is not None:  # which may work in place, and what was wanted is still needed
            tensors["x"] = tensors["x"].clone()
        for key in self.program.keys:
            tensors[key] = member.stores[key].read(state).reshape(-1)
        tensors["row"] = row
        noise = torch.tensor([member.noise_key(step), member.start or 0], dtype=torch.int32)
        tensors["noise"] = noise.to(row.device, non_blocking=True)
        index = None if member.start is not None and self.pieces is None else member.index
        if self.pieces is not None:
            results = self.pieces(tensors, dict(zip(self.program.names, numbers, strict=True)), member.index)
        else:
            run = self.program.plain if self.compiled is None else self.compiled
            if self.blocked is not None:
                results = in_blocks(run, member, member.layouts[self.blocked], tensors, self.program.narrow, step)
            else:
                results = settled(run(tensors, None, index), tensors.values())
        if self.program.measures:
            self._keep(member, {k: v for k, v in results.items() if "/" not in k}, step)
            return torch.cat([results[name] for name in self.sums]) if self.sums else torch.zeros(0)
        if "x" in results:
            bits = member.bits(step, SALT_WEIGHTS) if fmt.mode in ("stochastic", "grid") else None
            wanted = results.pop("x")
            for name, value in fmt.write(wanted, bits, member.rank_shape).items():
                target = stored[name]
                if target.data_ptr() != value.data_ptr() or target.numel() == 0:
                    target.copy_(value.reshape(target.shape))
            if self.told is not None:
                now = fmt.read(stored).reshape(-1)
                results |= self.told({**tensors, **results, "x": now, "error": wanted - now}, None, index)
        if "u" in results:
            given["u"].copy_(results.pop("u").reshape(given["u"].shape))
        self._keep(member, results, step)
        return row

    def _keep(self, member: Member, values: Mapping[str, Tensor], step: int) -> None:
        for position, (key, store) in enumerate((k, member.stores[k]) for k in self.program.keys):
            if key in values:
                stochastic = store.codec is not None and store.codec.stochastic
                salt, half = state_draw(position)
                bits = half(member.bits(step, salt)) if stochastic else None
                store.write(member.state, values[key].reshape(store.shape), bits)


def in_blocks(
    run: Callable[..., dict[str, Tensor]],
    member: Member,
    layout: Layout,
    tensors: Mapping[str, Tensor],
    narrow: frozenset[str],
    step: int,
) -> dict[str, Tensor]:
    """A program's results for flat local tensors, from running it on (blocks, elements), each run of equal blocks by itself."""
    p, fixed = member.spec, {"row": tensors["row"]}
    seen: dict[str, Tensor] = {}
    for name, t in tensors.items():
        if name in ("row", "noise"):
            continue
        if layout.gathers and name in member.stores:
            store = member.stores[name]
            t = shards.gather_as(member.tensor, t.reshape(store.shape), store.slot.shape, member.dims[name])
        elif layout.gathers:
            t = shards.gather(member.tensor, t.reshape(member.rank_shape))
        seen[name] = t.reshape(-1) if name in narrow else layout.enter(p, t)
    start = 0 if layout.gathers else member.start
    index = None
    if layout.turned or start is None or seen["x"].numel() >= 2**31:
        index = member.index if not layout.gathers else shards.numbered(seen["x"].numel(), seen["x"].device)
        index = layout.enter(p, index)
    made: dict[str, list[Tensor]] = {}
    first, at = 0, 0
    for count, length in layout.runs:
        piece = {name: t[first : first + count, None] if name in narrow else t[at : at + count * length].view(count, length)
                 for name, t in seen.items()}  # fmt: skip
        noise = torch.tensor([member.noise_key(step), int32((start or 0) + at)], dtype=torch.int32)
        where = None if index is None else index[at : at + count * length].view(count, length)
        inputs = {**piece, **fixed, "noise": noise.to(tensors["row"].device, non_blocking=True)}
        for name, value in settled(run(inputs, None, where), inputs.values()).items():
            made.setdefault(name, []).append(value.reshape(-1))
        first, at = first + count, at + count * length
    return {name: _back(name, values, member, layout, narrow) for name, values in made.items()}


def _back(name: str, values: list[Tensor], member: Member, layout: Layout, narrow: frozenset[str]) -> Tensor:
    """A result of all runs, flat and local; sums are added up."""
    if "/" in name:
        return torch.stack(values).sum(0)
    t = values[0] if len(values) == 1 else torch.cat(values)
    if name not in narrow:
        t = layout.leave(member.spec, t)
    if not layout.gathers:
        return t
    if name in member.stores:
        shape = member.stores[name].slot.shape
        return shards.scatter_as(member.tensor, t.reshape(shape), shape, member.dims[name]).reshape(-1)
    return shards.scatter(member.tensor, t.reshape(member.spec.shape)).reshape(-1)


def _own_code(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` behind a code object of its own: torch.compile counts recompilations by code, and all programs share theirs."""

    def run(*args: Any) -> Any:
        return fn(*args)

    code = run.__code__.replace(co_name=f"program_{next(_number)}")
    return FunctionType(code, run.__globals__, code.co_name, None, run.__closure__)


_number = itertools.count()
