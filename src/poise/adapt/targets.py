"""Which layers are adapted: by role, by name, by pattern, by class, or by a function."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from poise.modules import Rows
from poise.optim.routing import collect

from .layout import Layout

Target = str | type | Callable[[str, nn.Module], bool]
Targets = Target | Sequence[Target]

ROLES = {
    "linear": ("matrix",),  # hidden linear layers: neither the embedding nor the head
    "conv": ("conv",),
    "embedding": ("embedding",),
    "head": ("head",),
    "all": ("matrix", "conv"),
}
PATTERN = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Place:
    """One layer that is adapted.

    Attributes:
        path: of the layer in the model; of one that stands at several, the first.
        layer: itself.
        layout: how it maps inputs to outputs.
        tied: paths of other layers that hold the same weight, and are adapted with it.
    """

    path: str
    layer: Any
    layout: Layout
    tied: tuple[str, ...] = ()


def places(model: nn.Module, targets: Targets | None) -> list[Place]:
    """The layers that `targets` mean, in the model's order, each once.

    Args:
        targets: None: hidden linear layers. A role: "linear", "conv", "embedding", "head", or "all", hidden layers of both
            kinds. A pattern with `*` that the whole path must match; `re:` and an expression that must match all of it; a path
            or its end (`q_proj`, `self_attn.q_proj`); a class; a function of path and layer. Or several of those.

    Raises:
        ValueError: nothing is meant by one of them; a layer that cannot be adapted; a weight that is tied to one left out.
        TypeError: a target of another type.
    """
    wanted: Sequence[Target] = (
        ["linear"] if targets is None else [targets] if isinstance(targets, str | type) or callable(targets) else list(targets)
    )
    modules = dict(model.named_modules())
    roles = _roles(model)
    chosen: set[str] = set()
    for target in wanted:
        found = {path for path, layer in modules.items() if _is_meant(target, path, layer, roles)}
        if not found:
            raise ValueError(f"targets: {target!r} means no layer of the model; it has {_some(modules, roles)}")
        chosen |= found
    found = [Place(path, modules[path], Layout.of(path, modules[path])) for path in modules if path in chosen]
    return _tied(model, found)


def _is_meant(target: Target, path: str, layer: nn.Module, roles: dict[str, str]) -> bool:
    if isinstance(target, type):
        return isinstance(layer, target)
    if not isinstance(target, str):
        if not callable(target):
            raise TypeError(f"targets: {target!r} must be a string, a class or a function of path and layer")
        return bool(target(path, layer))
    if target in ROLES:
        return roles.get(path) in ROLES[target]
    if target.startswith("re:"):
        return re.fullmatch(target[3:], path) is not None
    if PATTERN.search(target):
        return path in roles and fnmatchcase(path, target)
    return path == target or path.endswith(f".{target}")


def _roles(model: nn.Module) -> dict[str, str]:
    """What the weight of each layer that has one is, by the layer's path."""
    found: dict[str, str] = {}
    named = _parameter_roles(model)
    for path, layer in model.named_modules():
        weight = layer._parameters.get("weight")
        if weight is not None and weight.ndim > 1:
            # A tied head counts as the embedding in the optimizer; here it is the layer that is asked for.
            role = named.get(id(weight), "")
            found[path] = "head" if role == "embedding" and isinstance(layer, nn.Linear) else role
    return found


def _parameter_roles(model: nn.Module) -> dict[int, str]:
    """By the parameter's id."""
    return {id(p): param.role for group in collect(model) for p, param in zip(group.tensors, group.described, strict=True)}


def norms(model: nn.Module) -> list[str]:
    """Names of the parameters that belong to the model's norms."""
    roles = _parameter_roles(model)
    return [name for name, p in model.named_parameters() if roles.get(id(p)) == "norm"]


def _tied(model: nn.Module, found: list[Place]) -> list[Place]:
    """The places, those that share one weight as one."""
    holders: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, layer in model.named_modules():
        for own, tensor in layer._parameters.items():
            if tensor is not None:
                holders.setdefault(id(tensor), []).append((f"{path}.{own}".removeprefix("."), layer))
    chosen = {id(place.layer): place for place in found}
    kept: list[Place] = []
    done: set[int] = set()
    for place in found:
        weight = place.layer.weight
        if id(weight) in done:
            continue
        done.add(id(weight))
        others = [(name, layer) for name, layer in holders.get(id(weight), []) if layer is not place.layer]
        for name, layer in others:
            twin = chosen.get(id(layer))
            if twin is None or twin.layout != place.layout:
                raise ValueError(
                    f"targets: '{place.path}.weight' is tied to {name!r}, which "
                    f"{'is not among the targets' if twin is None else 'reads it the other way round'}: a change of one would "
                    "be a change of both; leave it out, or untie them first (give one a copy of the weight)"
                )
        kept.append(Place(place.path, place.layer, place.layout, tuple(chosen[id(layer)].path for _, layer in others)))
    return kept


def _some(modules: dict[str, nn.Module], roles: dict[str, str]) -> str:
    paths = [f"{path} ({type(modules[path]).__name__})" for path in roles]
    more = f" and {len(paths) - 8} more" if len(paths) > 8 else ""
    return f"{', '.join(paths[:8])}{more}" if paths else "no layer with a weight"


def is_inputs_first(rows: Rows) -> bool:
    """Whether the weight is stored (in, out), as Conv1D of transformers has it."""
    return rows.groups == 1
