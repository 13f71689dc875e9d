"""Tensors that a caller hands in, one for each parameter: what `feed`, `preview` and `plan` take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .engine.members import Member


def by_tensor(members: Sequence[Member], given: Mapping[Any, Tensor] | Sequence[Tensor], what: str) -> dict[int, Tensor]:
    """Tensors by parameter identity, from a mapping by parameter or name, or a list in order."""
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
        if value is not None and tuple(value.shape) != tuple(m.spec.shape):
            raise ValueError(f"{what}: {m.spec.name!r} has shape {tuple(m.spec.shape)}, its tensor {tuple(value.shape)}")
    return found
