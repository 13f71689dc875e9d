"""Which layers of a model are meant, and tensors that change their place in one."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

Layers = type | tuple[type, ...] | str | Callable[[str, nn.Module], bool]


def chooser(layers: Layers) -> Callable[[str, nn.Module], bool]:
    """Whether a layer, given by path and itself, is among `layers`."""
    if isinstance(layers, str):
        return lambda path, layer: fnmatchcase(path, layers)
    if isinstance(layers, type | tuple):
        return lambda path, layer: isinstance(layer, layers)
    if not callable(layers):
        raise TypeError(f"layers={layers!r}: must be types, a glob of paths, or a function of path and layer")
    return layers


def linears(model: nn.Module, layers: Layers | None, default: Callable[[str, nn.Module], bool]) -> list[tuple[str, nn.Linear]]:
    """The linear layers of `model` among `layers`, with their paths; None: those of `default`.

    Raises:
        ValueError: there is none; or one is of a subclass, or parametrized, and may compute something else.
    """
    chosen = default if layers is None else chooser(layers)
    found = [(path, one) for path, one in model.named_modules() if isinstance(one, nn.Linear) and chosen(path, one)]
    if not found:
        raise ValueError(f"layers={layers!r}: the model has no such nn.Linear; say which, as in layers='blocks.*.mlp.*'")
    for path, one in found:
        if type(one) is not nn.Linear:
            raise ValueError(f"layers: {path!r} is a {type(one).__name__}, and only a plain nn.Linear can be replaced")
    return found


def become(layer: Any, kind: type[nn.Module]) -> Any:
    """Change the class of a layer and return it, as torch's parametrize does: hooks, names and other references stay."""
    layer.__class__ = kind
    return layer


def put_first(layer: Any, name: str, parameter: nn.Parameter) -> None:
    """Register a parameter before all others: torch's layers do so with their weight, and a state_dict has their order."""
    others = dict(layer._parameters)
    layer._parameters.clear()
    layer.register_parameter(name, parameter)
    layer._parameters.update(others)
