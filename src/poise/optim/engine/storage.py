"""How state is kept: one `Store` for each slot of each parameter, plain or encoded, whole or sharded.

An encoded slot is seen as rows, the first dimension apart, and each row is cut into blocks of the codec's size; blocks never
cross rows, so a shard along the first dimension encodes exactly as the whole does. The last block of a row stores no more
entries than the row has left.

A slot at rest is at its beginning and takes no memory: each of its tensors is one number, seen in every place.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poise.memory.codec import Codec, Kind, Part, get
from poise.memory.matrix import MatrixCodec, packed, unpacked

from ..transform import Param, Slot
from . import shards
from .calls import initial

# Smaller tensors stay in full precision: they hardly cost anything, and norms and biases are the ones that suffer.
SMALLEST = 4096
SHORTEST_ROW = 32


def codec_for(
    slot: Slot, p: Param, tensor: Tensor, wanted: Codec | None, dims: tuple[int | None, ...] | None = None
) -> Codec | None:
    """The codec that a slot is kept with; None keeps it plain. (One value for each block of a parameter is always plain.)

    A sharded slot is encoded only where its shards encode as the whole does: cut along the first dimension, or, with a single
    dimension, between blocks. `dims` are the parameter's dimensions that a slot of another shape follows.
    """
    codec = wanted if slot.codec is None else get(slot.codec)
    exempt = slot.kind == "exact" or slot.shared or not slot.dtype.is_floating_point or math.prod(slot.shape) < SMALLEST
    if codec is None or exempt or codec.block == 1:
        return None if exempt else codec
    assert slot.kind != "exact"
    codec = codec.for_slot(slot.kind, tuple(slot.shape))
    if len(slot.shape) > 1 and math.prod(slot.shape[1:]) < SHORTEST_ROW:
        return None
    if tuple(slot.shape) != tuple(p.shape):
        along = shards.cut(tensor)
        cut = [d is not None and d in along for d in dims or ()]
        return None if any(cut[1:] if len(cut) > 1 else cut) else codec
    if len(slot.shape) == 1:
        return codec if _even(tensor, codec.block) else None
    return codec if shards.box(tensor)[0][1:] == tuple(slot.shape[1:]) else None


def _even(tensor: Any, block: int) -> bool:
    """Whether every rank's piece of a one-dimensional tensor begins at a multiple of `block`."""
    if not shards.is_sharded(tensor):
        return True
    chunk = tensor.shape[0]
    for mesh_dim, placement in enumerate(tensor.placements):
        if hasattr(placement, "dim"):
            chunk = -(-chunk // tensor.device_mesh.size(mesh_dim))
    return chunk % block == 0


@dataclass
class Store:
    """One slot of one parameter.

    `keys` maps the parts of an encoded slot ("codes", "scale") to their names in `optimizer.state[p]`; a plain slot has one
    part "".
    """

    key: str
    slot: Slot
    shape: tuple[int, ...]  # local
    dtype: torch.dtype  # of the values that rules see
    codec: Codec | None

    @property
    def kind(self) -> Kind:
        """The slot's kind, as codecs know it; state of kind "exact" is never encoded."""
        assert self.slot.kind != "exact"
        return self.slot.kind

    @property
    def rows(self) -> tuple[int, int]:
        """Local rows and their length."""
        if len(self.shape) <= 1:
            return 1, math.prod(self.shape)
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def parts(self) -> dict[str, tuple[str, Part]]:
        """State key of each stored tensor, and what it holds."""
        if self.codec is None:
            return {"": (self.key, Part(self.dtype, 1))}
        if isinstance(self.codec, MatrixCodec):
            along = {name: Part(torch.float32, 1, axes) for name, axes in self.codec.axes(len(self.shape)).items()}
            return {name: (f"{self.key}.{name}", part) for name, part in (self.codec.parts(self.kind) | along).items()}
        if self.codec.block == 1:
            return {name: (self.key, part) for name, part in self.codec.parts(self.kind).items()}
        return {name: (f"{self.key}.{name}", part) for name, part in self.codec.parts(self.kind).items()}

    def stored_shape(self, part: Part, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of a stored tensor for a slot of `shape`."""
        if self.codec is None or self.codec.block == 1:
            return shape
        if part.axes is not None:
            return tuple(shape[axis] for axis in part.axes)
        length = math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)
        full, rest = divmod(length, self.codec.block)
        entries = full * part.per_block + min(rest, part.per_block)
        return (shape[0], entries) if len(shape) > 1 else (entries,)

    def create(self, p: Tensor, dims: tuple[int | None, ...]) -> dict[str, Tensor]:
        """The state tensors at their beginning, distributed as `p` is."""
        device = shards.local(p).device
        if self.slot.resting:
            local = self.at_rest(device)
            return {key: shards.like(p, local[key], *self._distributed(part, dims)) for key, part in self.parts.values()}
        weights = shards.local(p).detach() if dims else p
        value = initial(self.slot, self.shape, torch.empty(0, dtype=self.dtype, device=device), weights)
        local = {
            key: torch.empty(self.stored_shape(part, self.shape), dtype=part.dtype, device=device)
            for key, part in self.parts.values()
        }
        self.write(local, value, torch.zeros(self.shape, dtype=torch.int32, device=device), shards.groups(p))
        return {key: shards.like(p, local[key], *self._distributed(part, dims)) for key, part in self.parts.values()}

    def _distributed(self, part: Part, dims: tuple[int | None, ...]) -> tuple[tuple[int, ...], tuple[int | None, ...]]:
        """The whole shape of a stored tensor, and the dimensions of the parameter that its own follow."""
        whole = self.stored_shape(part, tuple(self.slot.shape))
        if part.axes is not None:
            return whole, tuple(dims[axis] for axis in part.axes)
        return whole, dims if len(whole) == len(dims) else dims[: len(whole)]

    def at_rest(self, device: torch.device) -> dict[str, Tensor]:
        """This rank's stored tensors at their beginning, without memory of their own."""
        assert not isinstance(self.slot.init, str)
        length = 1 if self.codec is None else self.codec.block
        shape = (*[1] * max(len(self.shape) - 1, 1), length)
        one = Store(self.key, self.slot, shape, self.dtype, self.codec)
        begin = torch.full(shape, float(self.slot.init), dtype=self.dtype, device=device)
        stored = one.encode(begin, torch.zeros(shape, dtype=torch.int32, device=device))
        return {
            key: stored[key].to(part.dtype).flatten()[0].clone().expand(self.stored_shape(part, self.shape))
            for key, part in self.parts.values()
        }

    def rest(self, state: dict[str, Tensor]) -> None:
        """Back to the beginning, and give the memory back."""
        for key, piece in self.at_rest(shards.local(state[next(iter(self.parts.values()))[0]]).device).items():
            state[key] = shards.anew(state[key], piece)

    def read(self, state: dict[str, Tensor]) -> Tensor:
        """The slot's values, in the local shape; the stored tensor itself where it is plain."""
        if self.codec is None:
            return shards.local(state[self.key])
        parts = {name: shards.local(state[key]) for name, (key, _) in self.parts.items()}
        if self.codec.block == 1:
            flat = self.codec.decode({name: part.reshape(-1) for name, part in parts.items()}, self.kind)
            return flat.to(self.dtype).reshape(self.shape)
        if isinstance(self.codec, MatrixCodec):
            if "codes" in parts:
                parts["codes"] = unpacked(parts["codes"], self.shape)
            return self.codec.decode_whole(parts, self.kind).to(self.dtype)
        rows, length = self.rows
        blocks = -(-length // self.codec.block)
        padded = {}
        for name, (_, part) in self.parts.items():
            padded[name] = _pad(parts[name].reshape(rows, -1), blocks * part.per_block).reshape(-1, part.per_block)
        values = self.codec.decode(padded, self.kind).reshape(rows, -1)[:, :length]
        return values.to(self.dtype).reshape(self.shape)

    def encode(self, value: Tensor, bits: Tensor | None, groups: tuple[Any, ...] = ()) -> dict[str, Tensor]:
        """State key -> stored tensor for new values; `groups` hold the other rows of a tensor that is seen whole."""
        if self.codec is None:
            return {self.key: value.to(self.dtype)}
        if isinstance(self.codec, MatrixCodec):
            over = functools.partial(shards.reduced, groups=groups)
            made = self.codec.encode_whole(value.float(), self.kind, self.slot.shape[0], over)
            if "codes" in made:
                made["codes"] = packed(made["codes"])
            return {key: made[name] for name, (key, _) in self.parts.items()}
        if self.codec.block == 1:
            made = self.codec.encode(value.float().reshape(-1), self.kind, None if bits is None else bits.reshape(-1))
            return {key: made[name].reshape(self.shape) for name, (key, _) in self.parts.items()}
        rows, length = self.rows
        blocks = -(-length // self.codec.block)
        padded = _pad(value.float().reshape(rows, length), blocks * self.codec.block).reshape(-1, self.codec.block)
        if bits is not None:
            bits = _pad(bits.reshape(rows, length), blocks * self.codec.block).reshape(-1, self.codec.block)
        made = self.codec.encode(padded, self.kind, bits)
        stored: dict[str, Tensor] = {}
        for name, (key, part) in self.parts.items():
            shape = self.stored_shape(part, self.shape)
            entries = shape[-1]
            stored[key] = made[name].reshape(rows, -1)[:, :entries].reshape(shape)
        return stored

    def write(
        self, state: dict[str, Tensor], value: Tensor, bits: Tensor | None, groups: tuple[Any, ...] | None = None
    ) -> None:
        """Keep new values. A sharded tensor that its format sees whole is written by all ranks at once."""
        if groups is None and isinstance(self.codec, MatrixCodec):
            groups = shards.groups(state[next(key for key, _ in self.parts.values())])
        for key, stored in self.encode(value, bits, groups or ()).items():
            target = awake(state, key)
            if target.data_ptr() != stored.data_ptr() or target.numel() == 0:
                target.copy_(stored.reshape(target.shape))


def rests(t: Tensor) -> bool:
    """Whether a stored tensor is one number that is seen in every place."""
    t = shards.local(t)
    return t.numel() > 1 and all(stride == 0 for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1)


def awake(state: dict[str, Tensor], key: str) -> Tensor:
    """This rank's stored tensor under `key`, to write into; one at rest gets memory."""
    if rests(state[key]):
        state[key] = dense(state[key])
    return shards.local(state[key])


def dense(t: Tensor) -> Tensor:
    """The same values, each in memory of its own."""
    return shards.anew(t, shards.local(t).contiguous()) if rests(t) else t


def put(state: dict[str, Tensor], key: str, value: Tensor, *, may_rest: bool = False) -> None:
    """Keep `value` under `key`, in the memory that is there; what rests goes on resting where that is its value."""
    value = shards.local(value)
    if may_rest and rests(value):
        state[key] = shards.anew(state[key], value)
    elif not rests(state[key]) or not bool((shards.local(state[key]) == value.to(state[key].device)).all()):
        awake(state, key).copy_(value)


def copied(t: Tensor) -> Tensor:
    """A copy of this rank's piece; what rests is never written into."""
    return shards.local(t) if rests(t) else shards.local(t).clone()


def nbytes(t: Tensor) -> int:
    """Bytes that this rank holds for a stored tensor."""
    return t.element_size() if rests(t) else shards.local(t).nbytes


def _pad(x: Tensor, columns: int) -> Tensor:
    return x if x.shape[1] == columns else torch.nn.functional.pad(x, (0, columns - x.shape[1]))
