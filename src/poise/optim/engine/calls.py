"""A call of a bound link: everything it may see, the inner rules it drives, and what it wrote.

An `Env` holds what one call may know and makes `k` of it, `call_update` makes the call, inner rules included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from poise.memory.rounding import unit

from ..transform import Context, Slot
from .links import Bound


class StateView(MutableMapping[str, Tensor]):
    """One link's state under the names it declared; remembers what was assigned."""

    def __init__(self, states: MutableMapping[str, Tensor], slots: Mapping[str, str], written: set[str]) -> None:
        self._states, self._slots, self._written = states, slots, written

    def __getitem__(self, name: str) -> Tensor:
        return self._states[self._slots[name]]

    def __setitem__(self, name: str, value: Tensor) -> None:
        key = self._slots[name]
        self._states[key] = value
        self._written.add(key)

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"state {name!r} is declared by slots() and cannot be deleted")

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)


@dataclass
class Env:
    """Everything a call of a link may know, beside `u`, `x` and its state."""

    grad: Tensor
    x: Tensor
    states: MutableMapping[str, Tensor]
    row: Mapping[str, Any]  # prefixed scalars
    written: set[str] = field(default_factory=set)
    totals: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # link prefix -> reduced values
    own: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # link prefix -> measured values
    feeds: Mapping[str, Tensor] = field(default_factory=dict)
    bits: Callable[[int], Tensor] | None = None  # salt -> int32 random bits, one for each element
    known: Mapping[str, Any] = field(default_factory=dict)  # step, clock, param, loss: where nothing is compiled
    rested: set[str] | None = None  # state keys that `refresh` puts to rest

    def context(self, bound: Bound, grad: Tensor, inner: tuple[Inner, ...] = ()) -> Context:
        scalars = {name.removeprefix(bound.prefix): v for name, v in self.row.items() if name.startswith(bound.prefix)}
        calls = iter(range(1 << 16))

        def draw() -> Tensor:
            assert self.bits is not None
            salt = bound.salt + 7919 * next(calls)
            return unit(self.bits(salt)).to(grad.dtype)

        known = {"loss": None, **dict.fromkeys(bound.link.may_feed), **self.feeds, **self.known}
        if "step" in known:
            known["step"] = bound.step(known["step"])
        return Context(
            scalars,
            grad=grad,
            total=self.totals.get(bound.prefix, {}),
            own=self.own.get(bound.prefix, {}),
            inner=inner,
            uniform=None if self.bits is None else draw,
            **known,
        )

    def view(self, bound: Bound) -> StateView:
        return StateView(self.states, bound.slots, self.written)

    def handles(self, bound: Bound) -> tuple[Inner, ...]:
        """The inner rules for `refresh`, which changes their state but does not run them."""
        if not bound.inner:
            return ()
        weights = bound.link.enter(self.x, self.view(bound), self.x, self.context(bound, self.grad))
        return tuple(Inner(b, self, None, w) for b, w in zip(bound.inner, weights, strict=True))


class Inner:
    """The handle `k.inner[i]` of a rule that another one drives."""

    def __init__(self, bound: Bound, env: Env, grad: Tensor | None, x: Tensor | None) -> None:
        self.bound, self.env, self.grad, self.x = bound, env, grad, x
        self.own: dict[str, Tensor] = {}
        if grad is not None and x is not None and bound.link.pure:
            measured = bound.link.measure(grad, env.view(bound), x, env.context(bound, grad))
            self.own = bound.link.reduce(measured, {}, env.context(bound, grad))

    @property
    def state(self) -> StateView:
        return self.env.view(self.bound)

    def apply(self, v: Tensor) -> Tensor:
        """The inner rule's update for `v`."""
        if self.grad is None or self.x is None:
            raise RuntimeError(f"{self.bound.link!r} is not run in this step: enter() gave None for it")
        env = Env(**{**self.env.__dict__, "grad": self.grad, "x": self.x})
        env.totals = {**env.totals, self.bound.prefix: self.own}
        return call_update(self.bound, v, env)

    def reset(self) -> None:
        """Put the inner rule's state back to its beginning, with that of the rules inside it."""
        for bound in self.bound.family():
            state = self.env.view(bound)
            for name, slot in bound.link.slots(bound.param).items():
                state[name] = initial(slot, state[name].shape, state[name], self.x)

    def rest(self) -> None:
        """The same, and free its memory until it is next written. For links that declare `rests`, in `refresh`."""
        if not any(link.rests for link in self.bound.outer):
            raise RuntimeError(f"{self.bound.link!r}: only inner rules of a link with rests=True can be put to rest")
        if self.env.rested is None:
            raise RuntimeError(f"{self.bound.link!r}: inner rules are put to rest in refresh() only")
        self.env.rested.update(self.bound.state_keys())

    def rebase(self, f: Callable[[Tensor], Tensor], squared: Callable[[Tensor], Tensor] | None = None) -> None:
        """Carry the inner rule's state over a change of basis: signed slots through `f`, nonnegative ones through `squared`.

        That of rules inside it too, where they see the same space.
        """
        for bound in self.bound.family():
            if bound.param.shape != self.bound.param.shape:
                continue  # a rule inside it that sees another space
            state = self.env.view(bound)
            for name, slot in bound.link.slots(bound.param).items():
                if slot.kind == "signed":
                    state[name] = f(state[name])
                elif slot.kind in ("nonneg", "upper") and squared is not None:
                    state[name] = squared(state[name])


def settled(results: Mapping[str, Tensor], inputs: Iterable[Tensor]) -> dict[str, Tensor]:
    """Results that do not share memory with an input: else one that is written first would change the other."""
    held = {t.untyped_storage()._cdata for t in inputs}
    return {name: t.clone() if t.untyped_storage()._cdata in held else t for name, t in results.items()}


def initial(slot: Slot, shape: Sequence[int], like: Tensor, x: Tensor | None) -> Tensor:
    """A slot's first value."""
    if slot.init == "eye":
        return torch.eye(*shape[-2:], dtype=like.dtype, device=like.device).expand(tuple(shape)).clone()
    if slot.init == "param":
        assert x is not None
        return x.detach().to(like.dtype).reshape(tuple(shape)).clone()
    return torch.full(tuple(shape), float(slot.init), dtype=like.dtype, device=like.device)


def call_update(bound: Bound, u: Tensor, env: Env) -> Tensor:
    """One link's update, with its inner rules at hand."""
    link, view, inner = bound.link, env.view(bound), ()
    if bound.inner:
        plain = env.context(bound, env.grad)
        # what the inner rules do not look at need not be carried over to them
        blind = all(b.link.blind and not b.link.pure for b in bound.inner)
        grads = (env.grad,) * len(bound.inner) if blind else link.enter(env.grad, view, env.x, plain)
        weights = (env.x,) * len(bound.inner) if blind else link.enter(env.x, view, env.x, plain)
        inner = tuple(Inner(b, env, g, w) for b, g, w in zip(bound.inner, grads, weights, strict=True))
    return link.update(u, view, env.x, env.context(bound, env.grad, inner))
