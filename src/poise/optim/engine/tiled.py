"""Runs a program on a CPU with a compiler: its kernel, and those of the state formats around it, tile by tile.

For one tile the order is: decode the state, apply the rule, encode the state. The rule's kernel reads gradient, weights and
state of element-wise formats in their own dtype and rounds them itself. Formats in blocks are compiled apart, so that their
number adds instead of multiplying; what passes between them stays in the core's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future

import numpy as np
import torch
from torch import Tensor

from poise.memory.codec import Codec
from poise.memory.rounding import noise_bits

from . import inductor, kernels, shards, tiles
from .blocks import Layout
from .identity import identity
from .members import LOW, SALT_WEIGHTS, Member, WeightFormat, noise_keys, state_draw
from .program import Program
from .tiles import Operand

NOISE = kernels.Arg("noise", torch.int32, (2,))


class Tiled:
    """A program for members of one signature."""

    def __init__(self, program: Program, like: Member) -> None:
        self.program, self.format, self.compute = program, like.format, like.format.compute
        self.keys = program.keys
        self.stores = {key: like.stores[key] for key in self.keys}
        self.blocked = {key: c for key, store in self.stores.items() if (c := store.codec) is not None and c.block > 1}
        self.inline = {key: c for key, store in self.stores.items() if (c := store.codec) is not None and c.block == 1}
        self.written = program.results()
        self.on_grid = program.ends and not program.measures and like.format.grid is not None
        layout = self._layout(like)
        # tensors as the rule sees them; where each block is one element, tiles are cut as for any element
        self.blocks = layout is not None and not layout.ones
        self.shape = (None,) if layout is None else (None, 1) if layout.ones else (None, inductor.LENGTH)
        self.launches: dict[tuple[int, ...], tiles.Launch] = {}
        self.columns = {name: i for i, name in enumerate(("g", "u", "x", "row"))}
        self.grad_dtype = like.tensor.dtype
        self.scratch: dict[str, int] = {}
        self.pending: list[tuple[Future[kernels.Kernel], tuple[Operand, ...], int]] = []
        tiles.start()
        self._plan()
        self.steps = [tiles.Step(kernel.result(), operands, block) for kernel, operands, block in self.pending]

    def _layout(self, member: Member) -> Layout | None:
        """The blocks that a tile must hold whole: those that the rule sees, or that have a scale each on the weights' grid."""
        if self.program.blocked is not None:
            return member.layouts[self.program.blocked.prefix]
        return member.cells if self.on_grid else None

    # -- planning -----------------------------------------------------------------------------------------------------

    def _plan(self) -> None:
        """Ask for every kernel (they compile side by side) and say where its arguments are."""
        for key, codec in self.blocked.items():
            self._decode(key, codec)
        written = self._rule()
        for position, key in enumerate(self.keys):
            if key in self.blocked and key in written:
                self._encode(key, self.blocked[key], position)

    def _column(self, name: str, dtype: torch.dtype, block: int = 1, per_block: int = 1) -> Operand:
        index = self.columns.setdefault(name, len(self.columns))
        return Operand("column", index, block, per_block * dtype.itemsize, dtype.itemsize)

    def _value(self, name: str) -> Operand:
        """Where a value in the computing dtype is: in the scratch if it was brought there, else in its tensor."""
        if self.blocks and name in self.program.narrow:
            return self._column(name, self._dtype(name), tiles.OWN)
        if name in self.scratch:
            size = self._dtype(name).itemsize
            return Operand("scratch", self.scratch[name], 1, size, size)
        return self._column(name, self._dtype(name))

    def _arg(self, name: str, dtype: torch.dtype, written: bool = False) -> kernels.Arg:
        """A tensor of the rule's kernel, in the shape that the rule sees."""
        narrow = name in self.program.narrow
        return kernels.Arg(name, dtype, (None, 1) if narrow else self.shape, written)

    def _dtype(self, name: str) -> torch.dtype:
        """Of a value as the rule's kernel reads it."""
        if name in self.inline:
            return next(iter(self.inline[name].parts(self.stores[name].kind).values())).dtype
        return self.stores[name].dtype if name in self.stores else self.compute

    def _to_scratch(self, name: str) -> Operand:
        self.scratch.setdefault(name, len(self.scratch))
        return self._value(name)

    def _add(
        self,
        fn: Callable[..., dict[str, Tensor]],
        args: Sequence[kernels.Arg],
        operands: Sequence[Operand],
        block: int = 1,
        known: Hashable = None,
    ) -> None:
        self.pending.append((kernels.native(fn, args, known), tuple(operands), block))

    def _decode(self, key: str, codec: Codec) -> None:
        store = self.stores[key]
        names = {name: stored for name, (stored, _) in store.parts.items()}
        args, operands = [], []
        for name, (stored, part) in store.parts.items():
            args.append(kernels.Arg(name, part.dtype, _shape(codec, part.per_block)))
            operands.append(self._column(stored, part.dtype, codec.block, part.per_block))
        kind = store.kind
        self._add(
            lambda out, **t: {"out": codec.decode({name: t[name] for name in names}, kind).to(store.dtype)},
            [*args, kernels.Arg("out", store.dtype, _shape(codec, codec.block), written=True)],
            [*operands, self._to_scratch(key)],
            codec.block,
            ("decode", codec, kind),
        )

    def _encode(self, key: str, codec: Codec, position: int) -> None:
        store = self.stores[key]
        kind, shape = store.kind, _shape(codec, codec.block)
        args, operands = [kernels.Arg("value", store.dtype, shape)], [self._value(key)]
        salt, half = state_draw(position)
        if codec.stochastic:
            args.append(kernels.Arg("noise", torch.int32, shape))
            operands.append(self._hashed(salt))
        for name, (stored, part) in store.parts.items():
            args.append(kernels.Arg(name, part.dtype, _shape(codec, part.per_block), written=True))
            operands.append(self._column(stored, part.dtype, codec.block, part.per_block))
        self._add(
            lambda value, noise=None, **t: codec.encode(value.to(torch.float32), kind, None if noise is None else half(noise)),
            args,
            operands,
            codec.block,
            ("encode", codec, kind, half),
        )

    def _hashed(self, salt: int) -> Operand:
        """Random bits for each element in the scratch, made once for the two slots that share them."""
        name = f"noise:{salt}"
        if name not in self.scratch:
            self.scratch[name] = len(self.scratch)
            self._add(
                lambda noise, out: {"out": _bits(noise, out, salt)},
                [NOISE, kernels.Arg("out", torch.int32, written=True)],
                [Operand("noise", block=0), Operand("scratch", self.scratch[name])],
                known=("noise", salt),
            )
        return Operand("scratch", self.scratch[name])

    def _rule(self) -> set[str]:
        """The rule's kernel, which ends with the weights in their own format; returns the state keys it writes."""
        program, fmt, compute = self.program, self.format, self.compute
        rounds = program.ends and not program.measures and fmt.mode != "plain"
        told = program.told if rounds else None
        if told is not None and fmt.dtype == torch.float16:  # a compiler takes a cast there and back for nothing at all
            raise kernels.Unsupported("what rounding keeps from float16 weights")
        example = program.example()
        written = {*self.written, *(told(example | {"error": example["x"]}) if told is not None else ())}
        args, operands = [self._arg("g", self.grad_dtype)], [self._column("g", self.grad_dtype)]
        args.append(self._arg("x", fmt.dtype, "x" in written))
        operands.append(self._column("x", fmt.dtype))
        if fmt.mode == "split":
            args.append(self._arg(LOW, torch.int16, "x" in written))
            operands.append(self._column(LOW, torch.int16))
        names = [*([] if program.begins and "u" not in written else ["u"]), *self.keys, *(f"feed:{f}" for f in program.feeds)]
        args += [self._arg(name, self._dtype(name), name in written) for name in names]
        operands += [self._value(name) for name in names]
        args += [kernels.Arg("row", compute, (max(len(program.names), 1),)), NOISE]
        operands += [Operand("column", self.columns["row"], 0, 0, 1), Operand("noise", block=0)]
        self.sums = [name for name in self.written if "/" in name]
        for i, name in enumerate(self.sums):
            args.append(kernels.Arg(name, torch.float64, (1,), written=True))
            operands.append(Operand("partial", 8 * i, 0, 8, 8))

        def fn(**t: Tensor) -> dict[str, Tensor]:
            seen = t | {"g": t["g"].to(compute), "x": fmt.read(t)} | {key: self._read(key, t[key]) for key in self.inline}
            results = program(seen)
            if rounds:
                wanted = results["x"]
                results |= fmt.write(wanted, _bits(t["noise"], wanted, SALT_WEIGHTS))
                if told is not None:  # what rounding kept from the weights
                    now = fmt.read(results)
                    results |= told(seen | results | {"x": now, "error": wanted - now})
            return results | {key: self._write(key, results[key], t["noise"]) for key in self.inline if key in results}

        formats = [(key, codec, self.stores[key].kind, self.stores[key].dtype) for key, codec in self.inline.items()]
        self._add(fn, args, operands, 0 if self.blocks else 1, identity(program, fmt, formats, self.keys, names))
        return written

    def _read(self, key: str, stored: Tensor) -> Tensor:
        """A slot of an element-wise format, as rules see it."""
        codec, store = self.inline[key], self.stores[key]
        (name,) = codec.parts(store.kind)
        return codec.decode({name: stored}, store.kind).to(store.dtype)

    def _write(self, key: str, value: Tensor, noise: Tensor) -> Tensor:
        codec, kind = self.inline[key], self.stores[key].kind
        salt, half = state_draw(self.keys.index(key))
        bits = half(_bits(noise, value, salt)) if codec.stochastic else None
        (made,) = codec.encode(value.to(torch.float32), kind, bits).values()
        return made

    # -- running ------------------------------------------------------------------------------------------------------

    def launch(self, members: Sequence[Member]) -> tiles.Launch:
        """The launch for these members, planned once."""
        key = tuple(map(id, members))
        if key in self.launches and any(state[name] is not t for state, name, t in self.launches[key].held):
            del self.launches[key]  # the user has put another tensor in a state's place
        if key not in self.launches:
            encoded = any(store.codec is not None and store.codec.block > 1 for store in self.stores.values())
            lengths = [m.local.numel() for m in members]
            rows = [self._row(m) if encoded else n for m, n in zip(members, lengths, strict=True)]
            partial = 8 * len(self.sums)
            blocks = [layout.runs for m in members if (layout := self._layout(m)) is not None] if self.blocks else None
            launch = tiles.Launch(
                self.steps, len(self.columns), lengths, rows, [m.runs for m in members], len(self.scratch), partial, blocks
            )
            for name, column in self.columns.items():
                if name not in ("g", "u", "x", "row") and not name.startswith("feed:"):
                    launch.held += [(m.state, name, m.state[name]) for m in members]
                    launch.table[:, column] = [self._address(m, name) for m in members]
            launch.noise = np.array([m.key for m in members], dtype=np.int64)
            self.launches[key] = launch
        return self.launches[key]

    def _address(self, member: Member, name: str) -> int:
        t = shards.local(member.state[name])
        shape, dtype = member.kept()[name]
        if tuple(t.shape) != shape or t.dtype != dtype or not t.is_contiguous():
            raise ValueError(
                f"parameter {member.spec.name!r}: state {name!r} must be a contiguous {dtype} tensor of shape {shape}, "
                f"not {t.dtype} of shape {tuple(t.shape)}"
            )
        return t.data_ptr()

    def _row(self, member: Member) -> int:
        shape = member.rank_shape
        return int(np.prod(shape[1:])) if len(shape) > 1 else int(np.prod(shape))

    def run(
        self,
        members: Sequence[Member],
        pointers: Mapping[str, Sequence[int]],
        rows: Sequence[Sequence[float]],
        which: Sequence[int],
        steps: Sequence[int],
    ) -> np.ndarray:
        """One step over `members`; returns their measured sums, (members, sums).

        Args:
            pointers: "g", "x" and, where used, "u" and feeds: an address for each member.
            rows, which: distinct rows of scalars, and each member's.
            steps: each member's step count.
        """
        launch = self.launch(members)
        for name, addresses in pointers.items():
            if name in self.columns:
                launch.table[:, self.columns[name]] = addresses
        row = np.asarray(rows, dtype=np.float64 if self.compute == torch.float64 else np.float32)
        if row.size:
            launch.table[:, self.columns["row"]] = row.ctypes.data + np.asarray(which) * row.strides[0]
        launch.keys[:] = noise_keys(launch.noise, np.asarray(steps, dtype=np.int64))
        launch.run()
        if not self.sums:
            return np.zeros((len(members), 0))
        return launch.sums(len(members), len(self.sums))


def _shape(codec: Codec, per_block: int) -> tuple[int | None, ...]:
    return (None,) if codec.block == 1 else (None, per_block)


def _bits(noise: Tensor, like: Tensor, salt: int) -> Tensor:
    """Random bits for a tile, by global element index."""
    size = like.shape[0] if like.ndim == 1 else like.shape[0] * like.shape[1]
    return noise_bits(noise[0] + salt, torch.arange(size, dtype=torch.int32) + noise[1]).reshape(like.shape)


__all__ = ["Tiled", "WeightFormat"]
