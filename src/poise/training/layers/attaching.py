"""Layers that hold their weight as something else, and `fold`, which makes plain layers of them again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import Parameter, is_lazy
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized, register_parametrization

from poise.linalg.lengths import wide
from poise.modules import Layers, Rows, chooser, put_first

from .reparameterization import Reparameterization

M = TypeVar("M", bound=nn.Module)


@dataclass
class _Place:
    """One layer that holds a weight."""

    path: str
    layer: nn.Module
    weight: Parameter


def reparameterize(
    model: M, kind: type[Reparameterization], layers: Layers | None = None, *, parameter: str = "weight", **options: Any
) -> M:
    """Hold the weights of some layers of `model` as `kind` does, in place; returns `model`.

    Do it before you make the optimizer: a kind that stores several tensors gives the layer new parameters. They are called
    `<layer>.parametrizations.<parameter>.original` or `.original0`, `.original1`, ... The last has the weight's shape, and
    `poise.optim` treats it as the matrix, convolution, embedding or head that the weight is.

    A weight that several layers share stays shared: it is held once, and all of them must be among `layers`.

    Args:
        model: a module; it may be such a layer itself.
        kind: `WeightNorm`, `WeightConditioning`, or your own.
        layers: types; a glob that the layer's whole path must match, as in "blocks.*.mlp.*"; or a function of path and layer.
            None for every nn.Linear and convolution. Parameters without two dimensions (norms) are passed over.
        parameter: the name of the weight within its layer.
        options: of `kind`.

    Raises:
        TypeError, ValueError: no such layer; a weight that is parametrized already, tied to a layer not chosen, without a shape
            yet, or that `kind` cannot hold; an unknown option. Nothing has been changed then.
    """
    places = _places(model, layers, parameter)
    shared: dict[int, list[_Place]] = {}
    for place in places:
        shared.setdefault(id(place.weight), []).append(place)
    _check_ties(model, places, parameter)
    planned: list[tuple[Reparameterization, list[_Place]]] = []
    for same in shared.values():
        name = f"{same[0].path}.{parameter}".removeprefix(".")
        views = {Rows.of(place.layer, place.weight) for place in same}
        if len(views) > 1:
            raise ValueError(f"{name!r} is tied to a weight that is stored the other way round: {[p.path for p in same]}")
        made = kind(views.pop(), **options)
        made.check(made.rows.view(wide(same[0].weight.detach())), name)
        planned.append((made, same))
    for made, (first, *others) in planned:
        register_parametrization(first.layer, parameter, made)
        held = _lists(first.layer)[parameter]
        made.attached(*held.parameters(recurse=False))
        for other in others:  # the tie lives on: one list, and so one set of stored tensors, for all
            register_parametrization(other.layer, parameter, nn.Identity())
            _lists(other.layer)[parameter] = held
    return model


def fold(model: M) -> M:
    """Make plain layers of all that `reparameterize` has changed, in place; returns `model`.

    Each gets the very tensor that its forward pass has used: outputs are the same bit for bit, and what was tied is tied again.
    The weights are new parameters: an optimizer of the old ones does not know them. To export while training goes on, fold a
    copy: `fold(copy.deepcopy(model))`. Parametrizations of other origin are left alone.
    """
    folded: dict[int, Parameter] = {}
    for layer in list(model.modules()):
        for name in list(_lists(layer)) if is_parametrized(layer) else ():
            held = _lists(layer)[name]
            if all(isinstance(one, Reparameterization) for one in held):
                if id(held) not in folded:
                    with torch.no_grad():
                        weight = held()
                    folded[id(held)] = Parameter(weight, any(p.requires_grad for p in held.parameters()))
                _make_plain(layer, name, folded[id(held)])
    return model


def _lists(layer: Any) -> dict[str, ParametrizationList]:
    """The parametrizations of `layer` by the name of the tensor (torch's ModuleDict, which behaves as a dict does)."""
    return layer.parametrizations


def _places(model: nn.Module, layers: Layers | None, parameter: str) -> list[_Place]:
    chosen = chooser((nn.Linear, _ConvNd) if layers is None else layers)
    places = []
    for path, layer in model.named_modules():
        if isinstance(layer, ParametrizationList) or not chosen(path, layer):
            continue
        name = f"{path}.{parameter}".removeprefix(".")
        if is_parametrized(layer, parameter):
            by = ", ".join(type(one).__name__ for one in _lists(layer)[parameter])
            raise ValueError(f"{name!r} is parametrized already, by {by}; fold() the model first, or leave this layer out")
        weight = layer._parameters.get(parameter)
        if weight is None:
            continue
        if is_lazy(weight):
            raise ValueError(f"{name!r} has no shape yet (a lazy module); run one batch through the model first")
        if weight.ndim > 2 and not isinstance(layer, _ConvNd):
            raise ValueError(f"{name!r} {tuple(weight.shape)} is no convolution's: which of its dimensions are the outputs?")
        if weight.ndim >= 2:
            places.append(_Place(path, layer, weight))
    if not places:
        raise ValueError(f"layers={layers!r}: there is no such layer with a {parameter!r} of two dimensions or more")
    return places


def _check_ties(model: nn.Module, places: list[_Place], parameter: str) -> None:
    """Raise ValueError if a chosen weight is used by a layer that was not chosen, which would then see what is stored."""
    chosen = {(id(place.layer), parameter) for place in places}
    weights = {id(place.weight): place for place in places}
    for path, layer in model.named_modules():
        for own, tensor in layer._parameters.items():
            place = weights.get(id(tensor))
            if place is not None and (id(layer), own) not in chosen:
                raise ValueError(
                    f"'{place.path}.{parameter}' is tied to '{path}.{own}', which is not among layers: choose both or neither"
                )


def _make_plain(layer: Any, name: str, weight: Parameter) -> None:
    """Put `weight` where a parametrization was. Unlike torch's own function, it leaves deep copies of the layer as they are.

    A copy shares the class that holds the property, from which torch would delete it.
    """
    held = layer.__class__
    del _lists(layer)[name]
    if _lists(layer):
        layer.__class__ = type(held.__name__, held.__bases__, {key: value for key, value in vars(held).items() if key != name})
    else:
        del layer.parametrizations
        layer.__class__ = held.__bases__[0]
    put_first(layer, name, weight)
