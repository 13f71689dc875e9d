"""The forms in which parameters are handed over, brought to one: a module or (name, tensor) pairs, with a group's options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

Params: TypeAlias = (
    nn.Module
    | Mapping[str, Tensor]
    | Iterable[Tensor]
    | Iterable[tuple[str, Tensor]]
    | Mapping[str, Any]
    | Iterable[Mapping[str, Any]]
)
Contents: TypeAlias = nn.Module | list[tuple[str | None, Tensor]]


@dataclass
class Source:
    """One group before its tensors are looked at: a module, or pairs whose names are None for bare tensors."""

    contents: Contents
    options: dict[str, Any]


def sources(params: Any) -> list[Source]:
    """Take `params` apart. Its dicts and lists are read, never written, and iterables are read once."""
    if isinstance(params, Tensor):
        raise TypeError("params must be an iterable of tensors, not one tensor: write [tensor]")
    if isinstance(params, nn.Module):
        return [Source(params, {})]
    if isinstance(params, Mapping):
        # A single group dict, unless every value is a tensor: then "params" is a parameter's name like the others.
        if "params" in params and not all(isinstance(value, Tensor) for value in params.values()):
            return [_group(params, "params")]
        return [Source(_contents(params, "params"), {})]
    items = _listed(params, "params")
    groups = [isinstance(item, Mapping) for item in items]
    if not any(groups):
        return [Source(_pairs(items, "params"), {})]
    if not all(groups):
        raise TypeError("params mixes group dicts with tensors: put the tensors into a dict of their own, {'params': [...]}")
    return [_group(group, f"params[{number}]") for number, group in enumerate(items)]


def _group(group: Mapping[str, Any], where: str) -> Source:
    if "params" not in group:
        raise ValueError(f"{where}: a group dict needs the key 'params', this one has {sorted(map(str, group))}")
    options = {key: value for key, value in group.items() if key != "params"}
    return Source(_contents(group["params"], f"{where}['params']"), options)


def _contents(given: Any, where: str) -> Contents:
    if isinstance(given, nn.Module):
        return given
    if isinstance(given, Tensor):
        return [(None, given)]
    if isinstance(given, Mapping):
        return _pairs(list(given.items()), where)
    return _pairs(_listed(given, where), where)


def _listed(given: Any, where: str) -> list[Any]:
    if isinstance(given, set | frozenset):
        raise TypeError(f"{where} is a set, whose order changes between runs: use a list")
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise TypeError(f"{where} must be a module, tensors, (name, tensor) pairs or group dicts, got {type(given).__name__}")
    return list(given)


def _pairs(items: list[Any], where: str) -> list[tuple[str | None, Tensor]]:
    pairs: list[tuple[str | None, Tensor]] = []
    for number, item in enumerate(items):
        paired = isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], str)
        name, tensor = item if paired else (None, item)
        if isinstance(tensor, nn.Module):
            raise TypeError(
                f"{where}[{number}] is a module: make it a group, {{'params': module}}, or join them in an nn.ModuleList"
            )
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{where}[{number if name is None else repr(name)}] must be a tensor, got {type(tensor).__name__}")
        pairs.append((name, tensor))
    if len({name is None for name, _ in pairs}) > 1:
        raise ValueError(f"{where}: some tensors have names and others have none; name all of them or none")
    return pairs
