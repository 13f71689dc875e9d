"""A stretch of a chain as one pure function of tensors: all that whoever runs it knows of a rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poise.memory.rounding import noise_bits

from .calls import Env, call_update, settled
from .links import Bound

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Program:
    """A run of "element" links as a pure function of flat tensors, or of (blocks, elements) if there are "block" links in it.

    Inputs, by name: "g" the raw gradient, "u" the incoming update (absent where the chain begins), "x" the weights, every state
    key, "row" the scalars, "noise" (key, global index of the first element). Results: the state keys it assigned, and "u", or,
    at the end of a chain, "x".
    """

    bound: tuple[Bound, ...]
    begins: bool  # u is the gradient
    ends: bool  # the result is added to the weights
    names: tuple[str, ...]  # of the row's entries, totals and own values included
    measures: bool = False  # phase one: results are sums, one (1,) float64 tensor per measured name
    feeds: tuple[str, ...] = ()
    listeners: tuple[Bound, ...] = ()  # links of the whole chain that want to be told what rounding kept (only where it ends)

    @property
    def blocked(self) -> Bound | None:
        """The first of its links that sees blocks: then all of them do, and one value for each block is (blocks, 1)."""
        return next((bound for bound in self.bound if bound.blocks is not None), None)

    @property
    def narrow(self) -> frozenset[str]:
        """State keys with one value for each block."""
        return frozenset(key for bound in self.bound for key in bound.narrow)

    @property
    def keys(self) -> tuple[str, ...]:
        """State keys that its links may touch."""
        return tuple(dict.fromkeys(key for bound in (*self.bound, *self.listeners) for key in bound.state_keys()))

    def env(self, tensors: Mapping[str, Tensor], row: Mapping[str, Any] | None = None, index: Tensor | None = None) -> Env:
        """The environment over `tensors`; scalars from the "row" tensor unless `row` gives them as numbers."""
        if row is None:
            row = dict(zip(self.names, tensors["row"].unbind(0), strict=True)) if self.names else {}
        totals: dict[str, dict[str, Any]] = {}
        own: dict[str, dict[str, Any]] = {}
        known = {"loss": row["loss"]} if "loss" in row else {}
        for name, value in row.items():
            for mark, found in (("total:", totals), ("own:", own)):
                if name.startswith(mark):
                    prefix, _, last = name.removeprefix(mark).rpartition("/")
                    found.setdefault(prefix, {})[last] = value
        noise, x = tensors["noise"], tensors["x"]

        def bits(salt: int) -> Tensor:
            if index is None:
                size = x.shape[0] if x.ndim == 1 else x.shape[0] * x.shape[1]
                where = (torch.arange(size, dtype=torch.int32, device=x.device) + noise[1]).reshape(x.shape)
            else:
                where = index
            return noise_bits(noise[0] + salt, where)

        states = {key: tensors[key] for key in self.keys}
        feeds = {name: tensors[f"feed:{name}"] for name in self.feeds}
        return Env(tensors["g"], x, states, row, set(), totals, own, feeds, bits, known)

    def __call__(
        self, tensors: Mapping[str, Tensor], row: Mapping[str, Any] | None = None, index: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The results, none of which shares memory with an input."""
        return settled(self.plain(tensors, row, index), tensors.values())

    def plain(
        self, tensors: Mapping[str, Tensor], row: Mapping[str, Any] | None = None, index: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The results as the rules gave them."""
        env = self.env(tensors, row, index)
        u = env.grad if self.begins else tensors["u"]
        results: dict[str, Tensor] = {}
        if self.measures:
            for bound in self.bound:
                measured = bound.link.measure(u, env.view(bound), env.x, env.context(bound, env.grad))
                for name, value in measured.items():
                    results[f"{bound.prefix}/{name}"] = value.to(torch.float64).reshape(1)
        else:
            for bound in self.bound:
                u = call_update(bound, u, env)
            results["x" if self.ends else "u"] = env.x + u if self.ends else u
        return results | {key: env.states[key] for key in env.written}

    @property
    def told(self) -> Callable[..., dict[str, Tensor]] | None:
        """As the program itself, for what rounding kept from the weights ("error"); None if no link asks for it."""
        if not self.listeners:
            return None

        def tell(
            tensors: Mapping[str, Tensor], row: Mapping[str, Any] | None = None, index: Tensor | None = None
        ) -> dict[str, Tensor]:
            env = self.env(tensors, row, index)
            for bound in self.listeners:
                bound.link.written(tensors["error"], env.view(bound), env.x, env.context(bound, env.grad))
            return settled({key: env.states[key] for key in env.written}, tensors.values())

        return tell

    def results(self) -> tuple[str, ...]:
        """Names of the results, found by running the function once on two elements."""
        return tuple(self(self.example()))

    def example(self) -> dict[str, Tensor]:
        """Inputs of two elements, or of two blocks of three."""
        full, narrow = _few(self.blocked), self.narrow
        names = ("g", "u", "x", *self.keys, *(f"feed:{f}" for f in self.feeds))
        tensors = {name: torch.ones((2, 1) if name in narrow else full) for name in names}
        return tensors | {"row": torch.ones(len(self.names)), "noise": torch.zeros(2, dtype=torch.int32)}


class _Watched(Mapping[str, Any]):
    """Remembers that it was looked at."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values_, self.seen = values, False

    def __getitem__(self, name: str) -> Any:
        self.seen = True
        return self.values_[name]

    def __iter__(self) -> Iterator[str]:
        self.seen = True
        return iter(self.values_)

    def __len__(self) -> int:
        self.seen = True
        return len(self.values_)


def reads_own(bound: Bound, names: Sequence[str], feeds: Sequence[str], row: Row, total: Row) -> bool:
    """Whether a link's update uses `k.own`, found by running it once on a few elements."""
    own = _Watched({name: torch.ones(()) for name in names})
    env = _trial(bound, feeds, row, total, own)
    call_update(bound, torch.ones_like(env.grad), env)
    return own.seen


def reads_loss(bound: Bound, names: Sequence[str], feeds: Sequence[str], row: Row, total: Row) -> bool:
    """Whether a link's update uses `k.loss`: whether one that is not a number reaches its results."""

    def spoiled(loss: float) -> bool:
        env = _trial(bound, feeds, row, total, {name: torch.ones(()) for name in names})
        env.known = {"loss": torch.tensor(loss)}
        results = [call_update(bound, torch.ones_like(env.grad), env), *(env.states[key] for key in env.written)]
        return any(bool(t.isnan().any()) for t in results)

    return not spoiled(1.0) and spoiled(float("nan"))


def _trial(bound: Bound, feeds: Sequence[str], row: Row, total: Row, own: Row) -> Env:
    """A few elements to run a link on, wherever the totals are: what is asked does not depend on their values."""
    total = {name: torch.ones_like(v, device="cpu") if isinstance(v, Tensor) else v for name, v in total.items()}
    example = Program((bound,), True, False, (), feeds=tuple(feeds)).example()
    states = {key: example[key] for key in bound.state_keys()}
    fed = {name: example[f"feed:{name}"] for name in feeds}
    env = Env(example["g"], example["x"], states, row, totals={bound.prefix: total}, own={bound.prefix: own}, feeds=fed)
    env.bits = lambda salt: torch.zeros(env.x.shape, dtype=torch.int32)
    return env


def _few(blocked: Bound | None) -> tuple[int, ...]:
    """The shape of an example."""
    return (2,) if blocked is None else (2, 3)
