"""Layers: a weight and its bias as one matrix `[W as (out, in * kernel) | b]`, for rules of unit "layer".

The weight leads: the state of the joint matrix is kept with it. A vector without a weight is a layer of one column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..transform import Param
from .views import stored_as, view_of


@dataclass(frozen=True)
class Layer:
    """What one parameter is to its layer."""

    param: Param  # of the joint matrix
    leads: bool
    partner: str | None  # name of the other parameter


def join(described: Sequence[Param]) -> dict[str, Layer]:
    """By parameter name, the layer that it belongs to."""
    layers: dict[str, Layer] = {}
    biases = {p.layer: p for p in described if p.role == "bias" and p.layer is not None}
    for p in described:
        if len(p.shape) < 2:
            continue
        bias = biases.get(p.layer) if p.layer is not None else None
        rows, columns = _one(p).matrix
        if bias is not None and (tuple(bias.shape) != (rows,) or bias.name in layers):
            bias = None
        joint = replace(p, shape=torch.Size((rows, columns + (bias is not None))), inputs_first=False, bias=bias is not None)
        layers[p.name] = Layer(joint, True, bias.name if bias else None)
        if bias is not None:
            layers[bias.name] = Layer(joint, False, p.name)
    for p in described:
        if p.name not in layers:
            layers[p.name] = Layer(replace(p, shape=torch.Size((p.shape.numel(), 1))), True, None)
    return layers


def joined(lead: Tensor, p: Param, follow: Tensor | None) -> Tensor:
    """The joint matrix of a weight, described by `p`, and its bias."""
    matrix = view_of("matrix", _one(p), lead) if lead.ndim > 1 else lead.reshape(-1, 1)
    return matrix if follow is None else torch.cat([matrix, follow.reshape(-1, 1)], dim=1)


def parted(matrix: Tensor, p: Param, follow: torch.Size | None) -> tuple[Tensor, Tensor | None]:
    """The two parameters' parts of a joint matrix."""
    if follow is None:
        return stored_as("matrix", _one(p), matrix, p.shape), None
    return stored_as("matrix", _one(p), matrix[:, :-1], p.shape), matrix[:, -1].reshape(follow)


def _one(p: Param) -> Param:
    """A layer is one matrix, a stack of experts too."""
    return replace(p, role="matrix", inputs_first=False) if p.role == "experts" else p
