"""Runs a program on a CPU with a compiler: its kernel, and those of the formats around it, tile by tile.

For one tile the order is: bring gradient, weights and encoded state into the computing dtype, apply the rule, round the
weights, tell the rule what rounding kept, encode the state. Rule and formats are compiled apart, so that their number adds
instead of multiplying; what passes between them stays in the core's cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future

import numpy as np
import torch
from torch import Tensor

from poise.memory.codec import Codec
from poise.memory.rounding import high16, noise_bits

from . import kernels, tiles
from .members import LOW, SALT_WEIGHTS, Member, WeightFormat, noise_keys, state_salt
from .program import Program
from .tiles import Operand

NOISE = kernels.Arg("noise", torch.int32, (2,))


class Tiled:
    """A program for members of one signature."""

    def __init__(self, program: Program, like: Member) -> None:
        self.program, self.format, self.compute = program, like.format, like.format.compute
        self.keys = program.keys
        self.stores = {key: like.stores[key] for key in self.keys}
        self.written = program.results()
        self.launches: dict[tuple[int, ...], tiles.Launch] = {}
        self.columns = {name: i for i, name in enumerate(("g", "u", "x", "row"))}
        self.grad_dtype = like.tensor.dtype
        self.scratch: dict[str, int] = {}
        self.pending: list[tuple[Future[kernels.Kernel], tuple[Operand, ...], int]] = []
        tiles.start()
        self._plan()
        self.steps = [tiles.Step(kernel.result(), operands, block) for kernel, operands, block in self.pending]

    # -- planning -----------------------------------------------------------------------------------------------------

    def _plan(self) -> None:
        """Ask for every kernel (they compile side by side) and say where its arguments are."""
        program, fmt = self.program, self.format
        ends = program.ends and not program.measures
        if self.grad_dtype != self.compute:
            self._cast("g", self.grad_dtype)
        if fmt.mode != "plain":
            self._read_weights()
        for key, store in self.stores.items():
            if store.codec is not None:
                self._decode(key, store.codec)
        self._rule()
        if ends and fmt.mode != "plain":
            self._write_weights()
        told = self._tell() if ends and fmt.mode != "plain" else ()
        for position, (key, store) in enumerate(self.stores.items()):
            if store.codec is not None and (key in self.written or key in told):
                self._encode(key, store.codec, position)

    def _column(self, name: str, dtype: torch.dtype, block: int = 1, per_block: int = 1) -> Operand:
        index = self.columns.setdefault(name, len(self.columns))
        return Operand("column", index, block, per_block * dtype.itemsize, dtype.itemsize)

    def _value(self, name: str) -> Operand:
        """Where a value in the computing dtype is: in the scratch if it was brought there, else in its tensor."""
        if name in self.scratch:
            size = self._dtype(name).itemsize
            return Operand("scratch", self.scratch[name], 1, size, size)
        return self._column(name, self._dtype(name))

    def _dtype(self, name: str) -> torch.dtype:
        """Of a value as rules see it."""
        return self.stores[name].dtype if name in self.stores else self.compute

    def _to_scratch(self, name: str) -> Operand:
        self.scratch.setdefault(name, len(self.scratch))
        return self._value(name)

    def _add(self, fn: object, args: Sequence[kernels.Arg], operands: Sequence[Operand], block: int = 1) -> None:
        self.pending.append((kernels.native(fn, args), tuple(operands), block))  # type: ignore[arg-type]

    def _cast(self, name: str, dtype: torch.dtype) -> None:
        compute = self.compute
        self._add(
            lambda source, out: {"out": source.to(compute)},
            [kernels.Arg("source", dtype), kernels.Arg("out", compute, written=True)],
            [self._column(name, dtype), self._to_scratch(name)],
        )

    def _weight_args(self, written: bool) -> tuple[list[kernels.Arg], list[Operand]]:
        args, operands = [kernels.Arg("x", self.format.dtype, written=written)], [self._column("x", self.format.dtype)]
        if self.format.mode == "split":
            args.append(kernels.Arg(LOW, torch.int16, written=written))
            operands.append(self._column(LOW, torch.int16))
        return args, operands

    def _read_weights(self) -> None:
        fmt = self.format
        args, operands = self._weight_args(written=False)
        self._add(
            lambda **t: {"out": fmt.read(t)},
            [*args, kernels.Arg("out", self.compute, written=True)],
            [*operands, self._to_scratch("x")],
        )

    def _write_weights(self) -> None:
        fmt = self.format
        args, operands = self._weight_args(written=True)
        self._add(
            lambda noise, wanted, **t: fmt.write(wanted, _bits(noise, wanted, SALT_WEIGHTS)),
            [NOISE, kernels.Arg("wanted", self.compute), *args],
            [Operand("noise", block=0), self._value("x"), *operands],
        )

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
        )

    def _encode(self, key: str, codec: Codec, position: int) -> None:
        store, salt = self.stores[key], state_salt(position)
        kind, stochastic = store.kind, codec.stochastic
        args, operands = [], []
        for name, (stored, part) in store.parts.items():
            args.append(kernels.Arg(name, part.dtype, _shape(codec, part.per_block), written=True))
            operands.append(self._column(stored, part.dtype, codec.block, part.per_block))
        self._add(
            lambda noise, value, **t: codec.encode(
                value.to(torch.float32), kind, high16(_bits(noise, value, salt)) if stochastic else None
            ),
            [NOISE, kernels.Arg("value", store.dtype, _shape(codec, codec.block)), *args],
            [Operand("noise", block=0), self._value(key), *operands],
            codec.block,
        )

    def _inputs(self, names: Sequence[str], written: Sequence[str]) -> tuple[list[kernels.Arg], list[Operand]]:
        args = [kernels.Arg(name, self._dtype(name), written=name in written) for name in names]
        operands = [self._value(name) for name in names]
        args += [kernels.Arg("row", self.compute, (max(len(self.program.names), 1),)), NOISE]
        operands += [Operand("column", self.columns["row"], 0, 0, 1), Operand("noise", block=0)]
        return args, operands

    def _rule(self) -> None:
        program = self.program
        names = [
            "g",
            *([] if program.begins and "u" not in self.written else ["u"]),
            "x",
            *self.keys,
            *(f"feed:{f}" for f in program.feeds),
        ]
        sums = [name for name in self.written if "/" in name]
        args, operands = self._inputs(names, self.written)
        for i, name in enumerate(sums):
            args.append(kernels.Arg(name, torch.float64, (1,), written=True))
            operands.append(Operand("partial", 8 * i, 0, 8, 8))
        self.sums = sums
        self._add(lambda **t: program(t), args, operands)

    def _tell(self) -> tuple[str, ...]:
        """The kernel that hands the rounding error to the links that want it; returns the state keys it writes."""
        told, fmt, program = self.program.told, self.format, self.program
        if not told:
            return ()
        written = told(program.example() | {"error": torch.ones(2)})
        args, operands = self._inputs(["g", *self.keys, *(f"feed:{f}" for f in program.feeds)], tuple(written))
        weight_args, weight_operands = self._weight_args(written=False)

        def fn(wanted: Tensor, **t: Tensor) -> dict[str, Tensor]:
            now = fmt.read(t)
            return told({**t, "x": now, "error": wanted - now})

        self._add(
            fn, [kernels.Arg("wanted", self.compute), *weight_args, *args], [self._value("x"), *weight_operands, *operands]
        )
        return tuple(written)

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
            launch = tiles.Launch(
                self.steps, len(self.columns), lengths, rows, [m.runs for m in members], len(self.scratch), partial
            )
            for name, column in self.columns.items():
                if name not in ("g", "u", "x", "row") and not name.startswith("feed:"):
                    launch.held += [(m.state, name, m.state[name]) for m in members]
                    launch.table[:, column] = [self._address(m, name) for m in members]
            launch.noise = np.array([m.key for m in members], dtype=np.int64)
            self.launches[key] = launch
        return self.launches[key]

    def _address(self, member: Member, name: str) -> int:
        t = local_tensor(member.state[name])
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
        return sum_tiles(launch, len(members), len(self.sums))


def sum_tiles(launch: tiles.Launch, members: int, sums: int) -> np.ndarray:
    """Partial results of the tiles added up for each tensor, in the order of the tiles whatever thread ran them."""
    total = np.zeros((members, sums))
    if len(launch.tiles):
        partial = launch.partial.reshape(-1).view(np.float64).reshape(len(launch.tiles), sums)
        owner = launch.tiles[:, 0]
        first = np.flatnonzero(np.r_[True, owner[1:] != owner[:-1]])
        total[owner[first]] = np.add.reduceat(partial, first, axis=0)
    return total


def local_tensor(t: Tensor) -> Tensor:
    return getattr(t, "_local_tensor", t)


def _shape(codec: Codec, per_block: int) -> tuple[int | None, ...]:
    return (None,) if codec.block == 1 else (None, per_block)


def _bits(noise: Tensor, like: Tensor, salt: int) -> Tensor:
    """Random bits for a tile, by global element index."""
    size = like.shape[0] if like.ndim == 1 else like.shape[0] * like.shape[1]
    return noise_bits(noise[0] + salt, torch.arange(size, dtype=torch.int32) + noise[1]).reshape(like.shape)


__all__ = ["Tiled", "WeightFormat"]
