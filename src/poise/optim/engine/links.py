"""Links bound to a parameter: how their state and scalars are named, and what the state of rules inside rules follows."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..transform import Chain, Param, Slot, Transform
from .blocks import Runs, narrow_slots, runs_of
from .layers import Layer

# What programs call their inputs beside the state of element and block links.
TAKEN = ("g", "u", "x", "row", "noise", "error")
# Salts keep apart the numbers that one element uses for different purposes in one step.
SALT_WEIGHTS, SALT_STATE, SALT_RULE = 0x51ED270B, 0x2C1B3C6D, 0x297A2D39

Dims = tuple[int | None, ...] | None


@dataclass(frozen=True)
class Bound:
    """A link with the names of its state in `optimizer.state[p]` and of its scalars in a row."""

    link: Transform
    prefix: str  # of its scalars
    param: Param
    slots: Mapping[str, str]  # slot name -> state key
    shared: Mapping[str, str]  # the same for slots that all members of the link share
    inner: tuple[Bound, ...] = ()
    salt: int = SALT_RULE  # of its random numbers
    outer: tuple[Transform, ...] = ()  # the rules that drive it, outermost first
    blocks: Runs | None = None  # of unit "block": how the parameter falls into blocks,
    narrow: frozenset[str] = frozenset()  # and the state keys that hold one value for each

    def state_keys(self) -> Iterator[str]:
        """State keys of the link and its inner rules."""
        yield from self.slots.values()
        for inner in self.inner:
            yield from inner.state_keys()

    def family(self) -> Iterator[Bound]:
        """The link and its inner rules, however deep."""
        yield self
        for inner in self.inner:
            yield from inner.family()

    def step(self, step: int) -> int:
        """The parameter's step count, as this link is told it."""
        for link in self.outer:
            step = link.inner_step(step)
        return step

    def due(self, step: int) -> bool:
        """Whether its `refresh` runs before this step of the parameter."""
        own = self.step(step)
        return own > 0 and self.link.due(own)

    def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float] | None:
        """This link's scalars and its inner rules', under their prefixes; None if this step only gathers."""
        own = self.link.scalars(self.step(step), hyper)
        if own is None:
            return None
        row = {f"{self.prefix}{name}": value for name, value in own.items()}
        for inner in self.inner:
            row.update(inner.scalars(step, hyper) or {})
        return row


def bind(links: Sequence[Transform], p: Param, layer: Layer | None = None) -> tuple[tuple[Bound, ...], dict[str, Slot]]:
    """Name every slot of a chain: plainly where names are unique in it, else with the link's name before it.

    A link of unit "layer" sees the joint matrix; its state is kept with the parameter that leads the layer.
    """
    seen = [layer.param if layer is not None and link.unit == "layer" else p for link in links]
    declared = [list(link.slots(q)) for link, q in zip(links, seen, strict=True)]
    names = [name for slots in declared for name in slots]
    keys: dict[str, Slot] = {}
    own = p.shape

    def visit(
        link: Transform, path: str, prefix: str, p: Param, outer: tuple[Transform, ...], layer_rule: bool, along: Dims = None
    ) -> Bound:
        top = not outer
        if isinstance(link, Chain):
            raise TypeError(f"{path}: an inner rule is a single link, got {link!r}")
        if not top and link.owns_step:
            raise ValueError(f"{path}: {link!r} owns its step (owns_step), so no other rule can drive it")
        if link.unit == "element" and top:
            _check_element(link, p)
        if link.unit == "block":
            _check_block(link, path, top)
        if link.rests and (*outer, link)[0].unit in ("element", "block"):
            raise ValueError(f"{link!r}: a rule of unit '{link.unit}' keeps all of its state in memory; make its unit 'tensor'")
        slots: dict[str, str] = {}
        shared: dict[str, str] = {}
        follows = layer is not None and layer_rule and not layer.leads
        for name, slot in ({} if follows else link.slots(p)).items():
            key = name if top and names.count(name) == 1 else f"{path}.{name}"
            if key in keys or key == "step":
                raise ValueError(f"{link!r}: state {key!r} exists twice for parameter {p.name}")
            if link.unit in ("element", "block") and key in TAKEN:
                raise ValueError(f"{link!r}: state {key!r} is called as what such a rule is given; call it otherwise")
            keys[key] = _within(slot, p, own, along, resting=any(rule.rests for rule in outer))
            (shared if slot.shared else slots)[name] = key
        inner = tuple(
            visit(
                rule,
                f"{path}.{index}.{type(rule).__name__}",
                f"{prefix}{index}.",
                part,
                (*outer, link),
                layer_rule,
                _through(along, dims, part.shape == p.shape),
            )
            for index, (rule, part, dims) in enumerate(zip(link.inner, link.parts(p), link.follows(p), strict=True))
        )
        salt = SALT_RULE + zlib.crc32(prefix.encode()) % (1 << 20) * 101
        if link.unit != "block":
            return Bound(link, prefix, p, slots, shared, inner, salt, outer)
        narrow = frozenset(slots[name] for name in narrow_slots(link, p, link.slots(p)))
        return Bound(link, prefix, p, slots, shared, inner, salt, outer, runs_of(link, p), narrow)

    bound = tuple(
        visit(link, f"{index}.{type(link).__name__}", f"{index}.", q, (), link.unit == "layer")
        for index, (link, q) in enumerate(zip(links, seen, strict=True))
    )
    return bound, keys


def _through(outer: Dims, inner: Dims, alike: bool) -> Dims:
    """What the dimensions of a part within a part follow."""
    if inner is None:
        return outer if alike else None
    return inner if outer is None else tuple(None if d is None else outer[d] for d in inner)


def _within(slot: Slot, p: Param, own: torch.Size, along: Dims, resting: bool) -> Slot:
    """A slot as its parameter keeps it: dimensions of a part as those of the parameter that they follow."""
    if resting and not slot.shared:
        if isinstance(slot.init, str):
            raise ValueError(f"parameter {p.name!r}: state that begins as {slot.init!r} cannot rest")
        slot = replace(slot, resting=True)
    if along is None or tuple(slot.shape) == tuple(own):
        return slot
    dims = tuple(range(len(slot.shape))) if slot.dims is None and tuple(slot.shape) == tuple(p.shape) else slot.dims
    return slot if dims is None else replace(slot, dims=tuple(None if d is None else along[d] for d in dims))


def _check_element(link: Transform, p: Param) -> None:
    """A rule that sees pieces can only keep state that is cut in the same way."""
    for name, slot in link.slots(p).items():
        if not slot.shared and tuple(slot.shape) != tuple(p.shape):
            raise ValueError(
                f"{link!r}: state {name!r} has shape {tuple(slot.shape)}, but an 'element' rule sees any piece of a "
                f"parameter, so its state must have the parameter's shape {tuple(p.shape)}; make the rule's unit 'tensor', or "
                "the slot shared"
            )


def _check_block(link: Transform, path: str, top: bool) -> None:
    """A rule that sees blocks is run over tiles of them, by itself."""
    if not top:
        raise ValueError(f"{path}: {link!r} sees blocks of a parameter (unit 'block'), so no other rule can drive it")
    kind = type(link)
    refreshes = link.every > 0 or kind.due is not Transform.due or kind.refresh is not Transform.refresh
    listens = kind.written is not Transform.written
    for has, what in ((link.inner, "inner rules"), (refreshes, "refresh()"), (listens, "written()")):
        if has:
            raise ValueError(f"{link!r}: a rule of unit 'block' has no {what}; make its unit 'tensor'")
