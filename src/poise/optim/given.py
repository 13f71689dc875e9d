"""Tensors that a caller hands in, one for each parameter: what `feed`, `preview` and `plan` take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .engine.members import Member

Given = Mapping[Any, Tensor] | Sequence[Tensor]  # by parameter or name, or in order


def by_tensor(members: Sequence[Member], given: Given, what: str, fed: str = "") -> dict[int, Tensor]:
    """Tensors by parameter identity, from a mapping by parameter or name, or a list in order; `fed`: the name they go by."""
    if not isinstance(given, Mapping):
        values = list(given)
        if len(values) != len(members):
            raise ValueError(f"{what}: {len(values)} tensors for {len(members)} parameters")
        given = {m.tensor: value for m, value in zip(members, values, strict=True)}
    by_name = {m.spec.name: m for m in members}
    found: dict[int, Tensor] = {}
    for key, value in given.items():
        if isinstance(key, str) and key not in by_name:
            raise ValueError(f"{what}: no parameter is called {key!r}")
        tensor = by_name[key].tensor if isinstance(key, str) else key
        if value is not None:
            found[id(tensor)] = value
    for m in members:
        value = found.get(id(m.tensor))
        wanted = m.fed_shapes.get(fed)
        if value is not None and tuple(value.shape) != tuple(m.spec.shape if wanted is None else wanted):
            needs = f"has shape {tuple(m.spec.shape)}" if wanted is None else f"is to be fed shape {tuple(wanted)}"
            raise ValueError(f"{what}: {m.spec.name!r} {needs}, its tensor {tuple(value.shape)}")
    return found


def fed(members: Sequence[Member], tensors: Mapping[str, Given]) -> dict[str, dict[int, Tensor]]:
    """What `feed` was given, by name and parameter identity; ValueError for a name that no rule reads."""
    wanted = {name for m in members for link in m.rule for name in (*link.feeds, *link.may_feed)}
    for name in tensors:
        if name not in wanted:
            raise ValueError(f"feed({name}=...): no rule here reads {name!r}; wanted: {', '.join(sorted(wanted)) or 'nothing'}")
    return {name: by_tensor(members, given, f"feed({name}=...)", name) for name, given in tensors.items()}


def ones_for(members: Sequence[Member]) -> dict[str, dict[int, Tensor]]:
    """Ones under every name that a rule must be fed."""
    names = {name for m in members for link in m.rule for name in link.feeds}
    return {
        name: {id(m.tensor): torch.ones(m.fed_shapes.get(name, m.local.shape), device=m.device) for m in members}
        for name in names
    }


@contextmanager
def standing(members: Sequence[Member], given: Mapping[int, Tensor] | None) -> Iterator[None]:
    """Within it, the gradients in `given` stand in the parameters, and no others; None: those that do."""
    held = [m.tensor.grad for m in members]
    try:
        if given is not None:
            for m in members:
                grad = given.get(id(m.tensor))
                m.tensor.grad = None if grad is None else grad.to(m.tensor.dtype)
        yield
    finally:
        for m, grad in zip(members, held, strict=True):
            m.tensor.grad = grad
