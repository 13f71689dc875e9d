"""Adapters folded into the weights, and taken out of them again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from poise.linalg.lengths import wide

from .attaching import adapters, kept_by


@torch.no_grad()
def fold(model: nn.Module) -> nn.Module:
    """Put what adapters do into the weights, in place; returns `model`. `unfold` restores them bit for bit.

        W <- the weight with which the plain layer does what the adapted one did, in float32 and rounded once

    Outputs are the same to rounding, with dropout off. The weights as they were are kept until `detach`.

    Raises:
        ValueError: the model is not adapted, or folded already; a method whose effect depends on the input.
    """
    kept = kept_by(model)
    if kept.folded:
        raise ValueError("model is folded already")
    found = adapters(model)
    if unfit := next((path for path, one in found.items() if not one.foldable), None):
        raise ValueError(
            f"{type(kept.method).__name__}: what it does at {unfit!r} depends on the input, so no weight does the same; "
            "keep the adapters, and export(model, folder) them"
        )
    changed = {path: folded_weight(model.get_submodule(path)) for path in found}
    for path, weight in changed.items():
        layer: Any = model.get_submodule(path)
        kept.folded[path] = layer.weight.detach().clone()
        layer.weight.data.copy_(weight)
        layer.adapter.active = False
    return model


@torch.no_grad()
def folded_weight(layer: Any) -> Tensor:
    """The weight that the plain layer would need, as it stores it and in its dtype."""
    rows, weight = layer.adapter.layout.rows, layer.weight.detach()
    return rows.stored(layer.adapter.folded(rows.view(wide(weight))), weight.shape).to(weight.dtype)


@torch.no_grad()
def unfold(model: nn.Module) -> nn.Module:
    """Take folded adapters out of the weights, bit for bit, in place; returns `model`."""
    kept = kept_by(model)
    if not kept.folded:
        raise ValueError("model is not folded")
    for path, weight in kept.folded.items():
        layer: Any = model.get_submodule(path)
        layer.weight.data.copy_(weight)
        layer.adapter.active = True
    kept.folded.clear()
    return model
