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
    return sum(kept_by(forward, model, lambda: "").values())


def kept_by(forward: Callable[[], Any], model: nn.Module | None, label: Callable[[], str]) -> dict[str, int]:
    """The same, parted by what `label()` says when each piece of memory is first kept. It counts on the meta device too."""
    own = [] if model is None else [*model.parameters(), *model.buffers()]
    there = {t.untyped_storage()._cdata for t in own}
    held: dict[int, Any] = {}  # the memory itself, so that none is given out twice while it is counted
    found: dict[str, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in there and storage._cdata not in held:
            held[storage._cdata] = storage
            found[label()] = found.get(label(), 0) + storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward()
    del result  # till here, as in training
    return found
