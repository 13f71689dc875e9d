"""What a forward pass keeps in memory for the backward pass, counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def kept_bytes(forward: Callable[[], Any], model: nn.Module | None = None) -> int:
    """Bytes that autograd keeps for the backward pass of `forward()`.

        kept_bytes(lambda: model(batch), model)

    Whatever several operations keep is counted once, and a view with all the memory that it holds. The parameters and buffers
    of `model`, which are there anyway, are not counted; activation checkpointing is seen as it is.

    Args:
        forward: computes something that requires a gradient; it is called once.
        model: whose own tensors are left out.
    """
    own = [] if model is None else [*model.parameters(), *model.buffers()]
    there = {t.untyped_storage().data_ptr() for t in own}
    kept: dict[int, Tensor] = {}  # the tensors themselves, so that no memory is given out twice while they are counted

    def pack(t: Tensor) -> Tensor:
        place = t.untyped_storage().data_ptr()
        if place not in there:
            kept[place] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward()
    found = sum(t.untyped_storage().nbytes() for t in kept.values())
    del result  # till here, as in training
    return found
