"""`params` read into groups of tensors, each tensor once, checked and described."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..transform import Param
from .roles import Found, ends, from_module, from_name
from .sources import Contents, Params, Source, sources
from .tree import clean_all


@dataclass
class Group:
    """One group of parameters as the caller gave it.

    Args:
        tensors: each parameter once.
        described: what is known of each, in the same order.
        options: what the caller set for this group (`lr`, `weight_decay`, ...), without "params".
        named: whether the caller gave names, by a module or in pairs.
    """

    tensors: list[Tensor]
    described: list[Param]
    options: dict[str, Any] = field(default_factory=dict)
    named: bool = True


@dataclass
class _Entry:
    """One tensor of a group, under the first name it was given (None: bare), and what was found at each of its places."""

    tensor: Tensor
    name: str | None
    found: list[Found]


def collect(params: Params, *, known: Sequence[Group] = ()) -> list[Group]:
    """Read `params` into groups, each tensor once and described by a `Param`.

    From a module every role is known by the type and place of the layer that owns the parameter; from names and from bare
    tensors by name and shape. Names are unique over all groups: bare tensors are called `param_0`, `param_1`, ... in the order
    given, and a group that repeats names of an earlier one, such as a second module, has `group_<its number>.` put before them.
    Nothing the caller owns is modified, generators are read once, and parameters that do not require grad are kept, because
    they may be unfrozen later. Integer parameters of a module, such as quantized weights, never can be and are left out.

    Args:
        params: a module; tensors; (name, tensor) pairs; a dict from names to tensors; or group dicts as torch.optim takes them,
            `{"params": any of these, "lr": ...}`, one or several.
        known: groups collected before, when adding to them (`add_param_group`).

    Raises:
        TypeError: `params` is not one of these, or a tensor is complex or of an integer type.
        ValueError: there is nothing in it; a parameter is in two groups, is not a leaf, or has no shape yet; some have names
            and others have none, or two have the same name.
    """
    groups = list(known)
    given = sources(params)
    at_ends = ends([source.contents for source in given if isinstance(source.contents, nn.Module)])
    for source in given:
        groups.append(_group(source, at_ends, groups))
    new = groups[len(known) :]
    if not any(group.tensors for group in new):
        raise ValueError("params is empty: there is no parameter to optimize")
    return new


def _group(source: Source, at_ends: Mapping[nn.Module, str], earlier: Sequence[Group]) -> Group:
    number = len(earlier)
    entries = _entries(source.contents, at_ends, number)
    named = not entries or entries[0].name is not None
    before = sum(len(group.tensors) for group in earlier)
    names = clean_all(f"param_{before + i}" if entry.name is None else entry.name for i, entry in enumerate(entries))

    seen = {id(tensor): param.name for group in earlier for tensor, param in zip(group.tensors, group.described, strict=True)}
    for entry, name in zip(entries, names, strict=True):
        _check(entry.tensor, name)
        if id(entry.tensor) in seen:
            raise ValueError(f"params: {name!r} of group {number} is in an earlier group too, as {seen[id(entry.tensor)]!r}")
    if entries and any(group.named != named for group in earlier if group.tensors):
        raise ValueError(
            f"params: the tensors of group {number} have {'names' if named else 'no names'}, unlike those of earlier groups; "
            "name the tensors of all groups, as in {'params': [('temperature', tensor)]}, or of none"
        )

    prefix = f"group_{number}." if set(names) & set(seen.values()) else ""
    described = []
    for index, (entry, name) in enumerate(zip(entries, names, strict=True)):
        found = _foremost(entry.found)
        layer = _layer(name, owned=isinstance(source.contents, nn.Module))
        described.append(
            Param(
                name=prefix + name,
                shape=torch.Size(entry.tensor.shape),
                dtype=entry.tensor.dtype,
                role=found.role,
                heads=found.heads,
                layer=layer if layer is None else f"{prefix}{layer}".removesuffix("."),
                index=index,
                count=len(entries),
                splits=found.splits,
                tied=len(entry.found) > 1,
                inputs_first=found.inputs_first,
            )
        )
    return Group([entry.tensor for entry in entries], described, source.options, named)


def _entries(contents: Contents, at_ends: Mapping[nn.Module, str], number: int) -> list[_Entry]:
    """The tensors of one group in the order given, each once."""
    entries: dict[int, _Entry] = {}
    called: dict[str, Tensor] = {}
    for name, tensor, found in _places(contents, at_ends):
        if name is not None and called.setdefault(name, tensor) is not tensor:
            raise ValueError(f"params: two different tensors of group {number} are called {name!r}")
        entries.setdefault(id(tensor), _Entry(tensor, name, [])).found.append(found)
    return list(entries.values())


def _places(contents: Contents, at_ends: Mapping[nn.Module, str]) -> Iterator[tuple[str | None, Tensor, Found]]:
    if isinstance(contents, nn.Module):
        for name, tensor, found in from_module(contents, at_ends):
            if tensor.is_floating_point() or tensor.is_complex():
                yield name, tensor, found
        return
    cleaned = clean_all(name or "" for name, _ in contents)
    for plain, (name, tensor) in zip(cleaned, contents, strict=True):
        yield name, tensor, from_name(plain, torch.Size() if is_lazy(tensor) else tensor.shape)


def _foremost(found: list[Found]) -> Found:
    """What a tied weight counts as: an embedding wherever it is one, else a head, else what it is at its first place."""
    for role in ("embedding", "head"):
        for one in found:
            if one.role == role:
                return one
    return found[0]


def _layer(name: str, *, owned: bool) -> str | None:
    """The path of the module that owns `name`; what parametrize keeps belongs to the layer whose weight it makes.

    `owned`: the name came with its module, so that a name without a path is the root's own. Plain names such as "w1" and "b2"
    say of no layer that they share it.
    """
    if not owned and "." not in name:
        return None
    path = name.rpartition(".")[0]
    return re.sub(r"(^|\.)parametrizations\..*", "", path)


def _check(tensor: Tensor, name: str) -> None:
    if is_lazy(tensor):
        raise ValueError(f"params: {name!r} has no shape yet (a lazy module); run one batch through the model first")
    if tensor.is_complex():
        raise TypeError(
            f"params: {name!r} is {tensor.dtype}, and complex tensors are not optimized; keep torch.view_as_real(tensor) as "
            "the parameter and take torch.view_as_complex of it in forward"
        )
    if not tensor.is_floating_point():
        raise TypeError(f"params: {name!r} is {tensor.dtype}; only floating-point tensors can be optimized")
    if tensor.requires_grad and not (tensor.is_leaf or tensor.retains_grad):
        raise ValueError(f"params: {name!r} is the result of an operation (can't optimize a non-leaf Tensor)")
