"""One parameter as the engine sees it: its rule, its state, its weights' format, its place in the whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from poise.memory import rounding
from poise.memory.codec import Codec
from poise.memory.grid import GRIDS, Grid

from ..transform import Chain, Param, Transform
from . import shards
from .blocks import Layout, layout
from .layers import Layer
from .links import SALT_STATE, SALT_WEIGHTS, Bound, bind
from .storage import Store, codec_for

Weights = Literal["auto", "stochastic", "nearest", "split", "int8", "int4", "fp8"]
LOW = "weight.low"  # state key of the lower 16 bits under weights="split"


@dataclass(frozen=True)
class WeightFormat:
    """How the weights are read and written: their dtype, and how a float32 result is brought into it."""

    dtype: torch.dtype
    mode: Literal["plain", "stochastic", "nearest", "split", "grid"]
    grid: Grid | None = None

    @classmethod
    def of(cls, dtype: torch.dtype, weights: Weights | Grid) -> WeightFormat:
        """The format of parameters of `dtype`; "auto" rounds bfloat16 stochastically, a grid or its name rounds to it.

        To nearest, a bfloat16 weight does not move unless the update is 1/512 of it; stochastic rounding moves it on average
        by exactly the update ("Revisiting BFloat16 Training", arXiv 2010.06192).
        """
        if isinstance(weights, Grid) or weights in GRIDS:
            return cls(dtype, "grid", grid_of(weights))
        if dtype in (torch.float32, torch.float64):
            return cls(dtype, "plain")
        if dtype == torch.bfloat16:
            return cls(dtype, "stochastic" if weights == "auto" else weights)  # pyright: ignore[reportArgumentType]
        if weights in ("stochastic", "split"):
            raise ValueError(
                f"weights={weights!r} is for bfloat16 parameters, and one here is {dtype}; use 'auto' or 'nearest'"
            )
        return cls(dtype, "nearest")

    @property
    def compute(self) -> torch.dtype:
        """What rules compute in."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def read(self, stored: Mapping[str, Tensor]) -> Tensor:
        """The weights in the computing dtype, from {"x": ..., LOW: ...}."""
        if self.mode == "split":
            return rounding.join(stored["x"], stored[LOW])
        return stored["x"].to(self.compute)

    def write(self, x: Tensor, bits: Tensor | None, shape: tuple[int, ...] = ()) -> dict[str, Tensor]:
        """What to store for new weights `x`; `bits` are needed by stochastic rounding.

        A grid also needs the shape, unless rows of `x` are the pieces that have a scale each.
        """
        if self.grid is not None:
            noise = None if bits is None or not self.grid.stochastic else rounding.unit(bits)
            if not shape:
                return {"x": self.grid.cells(x, noise).to(self.dtype)}
            noise = None if noise is None else noise.view(shape)
            return {"x": self.grid.rounded(x.view(shape), noise).reshape(x.shape).to(self.dtype)}
        if self.mode == "split":
            high, low = rounding.split(x)
            return {"x": high, LOW: low}
        if self.mode == "stochastic":
            assert bits is not None
            return {"x": rounding.stochastic_bf16(x, rounding.high16(bits))}
        return {"x": rounding.nearest_bf16(x) if self.dtype == torch.bfloat16 else x.to(self.dtype)}


class Member:
    """A parameter with everything that is fixed while the plan stands."""

    def __init__(
        self,
        tensor: Tensor,
        spec: Param,
        group: dict[str, Any],
        rule: Chain,
        codec: Codec | None,
        weights: Weights | Grid,
        seed: int,
        layer: Layer | None = None,
    ) -> None:
        self.tensor, self.spec, self.group, self.rule = tensor, spec, group, rule
        apart = grid_of(weights) is not None and not gridded(spec, tensor)
        self.format = WeightFormat.of(tensor.dtype, "auto" if apart else weights)
        self.device, self.local_shape = shards.local(tensor).device, shards.local(tensor).shape
        self.scale = 1.0  # factor of the update, for scale="rms"
        self.key = rounding.key_of(seed, spec.name, 0)
        for link in rule:
            if link.unit == "matrix":
                check_matrix(spec)
        self.layer = layer
        self.partner: Member | None = None
        self.bound, slots = bind(rule.links, spec, layer)
        self.fed_shapes: dict[str, tuple[int, ...]] = {}  # of what is fed to it in another shape than its own
        for b in self.bound:
            shapes = b.link.fed_shapes(b.param)
            if shapes and b.link.unit not in ("matrix", "tensor"):
                raise ValueError(f"{b.link!r} is of unit {b.link.unit!r}: what it is fed has the parameter's shape")
            self.fed_shapes |= shapes
        self.shared = {key: slot for key, slot in slots.items() if slot.shared}
        self.layouts: dict[str, Layout] = {}  # of block links, by their prefix
        narrow: dict[str, Layout] = {}
        for b in self.bound:
            if b.blocks is not None:
                found = self.layouts[b.prefix] = layout(tensor, spec, b.blocks, [slots[key] for key in b.narrow])
                narrow |= dict.fromkeys(b.narrow, found)
        self.dims: dict[str, tuple[int | None, ...]] = {}
        self.stores: dict[str, Store] = {}
        for key, slot in slots.items():
            if slot.shared:
                continue
            dims = slot.dims
            if key in narrow:
                dims = (0 if narrow[key].follows else None, *[None] * len(slot.shape))[: len(slot.shape)]
            elif dims is None:
                dims = tuple(range(len(slot.shape))) if tuple(slot.shape) == tuple(spec.shape) else (None,) * len(slot.shape)
            box, _ = shards.box(tensor)
            shape = tuple(s if d is None else box[d] for s, d in zip(slot.shape, dims, strict=True))
            dtype = self.format.compute if slot.dtype == torch.float32 else slot.dtype
            self.dims[key] = dims
            kept = None if key in narrow else codec_for(slot, spec, tensor, codec, dims)
            self.stores[key] = Store(key, slot, shape, dtype, kept)
        self.state: dict[str, Tensor] = {}

    @property
    def wanted(self) -> bool:
        """Whether it needs state: not while it is frozen and has no gradient, nor has the other parameter of its layer."""
        both = (self.tensor,) if self.partner is None else (self.tensor, self.partner.tensor)
        return any(t.requires_grad or t.grad is not None for t in both)

    @property
    def awake(self) -> bool:
        """Whether it has state of its own, and is stepped; else it may still hold what a link shares."""
        return "step" in self.state

    def create(self) -> dict[str, Tensor]:
        """Its state at the beginning."""
        state: dict[str, Tensor] = {"step": torch.zeros((), dtype=torch.int64)}
        for key, store in self.stores.items():
            state |= store.create(self.tensor, self.dims[key])
        if self.format.mode == "split":
            low = torch.zeros(shards.box(self.tensor)[0], dtype=torch.int16, device=shards.local(self.tensor).device)
            state[LOW] = shards.like(self.tensor, low, self.spec.shape, tuple(range(len(self.spec.shape))))
        return state

    def kept(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Local shape and dtype of every state tensor."""
        kept = {
            key: (store.stored_shape(part, store.shape), part.dtype)
            for store in self.stores.values()
            for key, part in store.parts.values()
        }
        return kept | ({LOW: (self.rank_shape, torch.int16)} if self.format.mode == "split" else {})

    @property
    def resting(self) -> set[str]:
        """State keys of what may be at rest."""
        return {key for store in self.stores.values() if store.slot.resting for key, _ in store.parts.values()}

    @property
    def local(self) -> Tensor:
        """This rank's weights."""
        return shards.local(self.tensor).detach()

    @cached_property
    def cells(self) -> Layout | None:
        """The pieces of this rank's weights that have a scale each on the weights' grid; None where no tile could hold them."""
        shape = self.rank_shape
        if self.format.grid is None or not shape:
            return None
        row = math.prod(shape[1:])
        runs = self.format.grid.runs(shape[0], row)
        return None if runs is None else Layout(runs, False, False, False, True, row)

    @cached_property
    def runs(self) -> list[tuple[int, int, int]]:
        return shards.runs(self.tensor)

    @cached_property
    def index(self) -> Tensor:
        """Global index of every local element, for noise. Kept, at 4 bytes an element: see `start`."""
        return shards.index(self.tensor)

    @cached_property
    def start(self) -> int | None:
        """Global index of the first local element, if the others follow it one by one and need no `index`; else None."""
        if len(self.runs) > 1 or self.local.numel() >= 2**31:
            return None
        return rounding.int32(self.runs[0][2]) if self.runs else 0

    def groups(self, link: Transform) -> tuple[Any, ...]:
        """Process groups over which what a link measured of it is added up."""
        gathered = any(b.link is link and b.prefix in self.layouts and self.layouts[b.prefix].gathers for b in self.bound)
        return () if gathered else shards.groups(self.tensor)

    @property
    def rank_shape(self) -> tuple[int, ...]:
        return shards.box(self.tensor)[0]

    def noise_key(self, step: int) -> int:
        """The key of its random numbers in one step, as a signed 32-bit number."""
        return int(noise_keys(np.array([self.key]), np.array([step]))[0])

    def bits(self, step: int, salt: int) -> Tensor:
        """Random bits for every local element."""
        if self.start is None or "index" in self.__dict__:
            where = self.index
        else:
            where = torch.arange(self.local.numel(), dtype=torch.int32, device=self.device) + self.start
        # the key as a number: as a tensor, a GPU would be waited for
        return rounding.noise_bits(rounding.int32(self.noise_key(step) + salt), where)

    def row(self, step: int) -> dict[str, Any]:
        """The scalars of its links in one step; with "gathers" where one of them only gathers then."""
        row: dict[str, Any] = {}
        hyper = self.group if self.scale == 1.0 else {**self.group, "update_scale": self.scale}
        for bound in self.bound:
            scalars = bound.scalars(step, hyper)
            if scalars is None:
                row["gathers"] = True
            else:
                row.update(scalars)
        return row

    def signature(self) -> tuple[Any, ...]:
        """Members with equal signatures run through the same kernels."""
        tiled = [key for b in self.bound if b.link.unit in ("element", "block") for key in b.state_keys()]
        stores = tuple((key, self.stores[key].slot.kind, self.stores[key].dtype, self.stores[key].codec) for key in tiled)
        blocks = tuple((prefix, found.ones, self.tiled(prefix)) for prefix, found in self.layouts.items())
        gridded = self.rounds_in_tiles() if self.format.grid is not None else None
        return (self.format, self.device, stores, blocks, gridded, tuple(b.narrow for b in self.bound if b.blocks is not None))

    def tiled(self, prefix: str) -> bool:
        """Whether a block link's stretch can be run over this parameter where it is, tile by tile."""
        return self.layouts[prefix].suits(self._codec_blocks())

    def rounds_in_tiles(self) -> bool:
        """Whether weights can be brought onto their grid tile by tile."""
        return self.cells is not None and self.cells.suits(self._codec_blocks())

    def _codec_blocks(self) -> list[int]:
        return sorted({store.codec.block for store in self.stores.values() if store.codec is not None} - {1})


def grid_of(weights: Weights | Grid) -> Grid | None:
    """The grid that a choice of weights means."""
    return weights if isinstance(weights, Grid) else GRIDS.get(weights)


def gridded(p: Param, tensor: Tensor) -> bool:
    """Whether weights of a grid's format are on the grid: vectors and output heads stay as they are, for they suffer most."""
    if len(p.shape) < 2 or p.role == "head":
        return False
    if shards.box(tensor)[0][1:] != tuple(p.shape[1:]):
        raise ValueError(
            f"parameter {p.name!r}: rows of a grid have a scale each, so it can be sharded along its first dimension only"
        )
    return True


def check_matrix(p: Param) -> None:
    """A matrix rule needs matrices, or ValueError."""
    if len(p.shape) < 2:
        raise ValueError(
            f"parameter {p.name!r} has shape {tuple(p.shape)}: a matrix rule needs two dimensions or more. Route it to another "
            "rule (Muon and its kin do so by themselves); if sharding flattened it, shard with fully_shard (FSDP2) instead"
        )


def state_draw(position: int) -> tuple[int, Callable[[Tensor], Tensor]]:
    """Salt of the rounding noise of the slot at `position`, and which half of it is its own: two slots share a hash."""
    return rounding.int32(SALT_STATE + 0x3C6EF372 * (position // 2 + 1)), rounding.low16 if position % 2 else rounding.high16


def noise_keys(keys: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Keys of a step's random numbers, from the parameters' own keys."""
    return ((keys + steps * 0xC2B2AE3D) & 0xFFFFFFFF).astype(np.uint32).view(np.int32)


__all__ = ["LOW", "SALT_WEIGHTS", "Bound", "Member", "WeightFormat", "Weights", "noise_keys", "state_draw"]
