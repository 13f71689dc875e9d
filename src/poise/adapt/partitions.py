"""Partitions of a network: runs of modules that follow each other in its forward pass, and what they read and give."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Partition = str | nn.Module | Sequence[str | nn.Module]
Ends = tuple[nn.Module, nn.Module]


def ends_of(model: nn.Module, partition: Partition) -> Ends:
    """The first and the last module of a partition."""
    several = [partition] if isinstance(partition, str | nn.Module) else list(partition)
    if not several:
        raise ValueError("partitions: one of them is empty")
    held = {id(module) for module in model.modules()}
    found: list[nn.Module] = []
    for one in several:
        if isinstance(one, str) and one not in dict(model.named_modules()):
            raise ValueError(f"partitions: {one!r} is no module of the model")
        module = model.get_submodule(one) if isinstance(one, str) else one
        if id(module) not in held:
            raise ValueError(f"partitions: a {type(module).__name__} of them is no module of the model")
        found.append(module)
    return found[0], found[-1]


@torch.no_grad()
def seen_by(model: nn.Module, found: Sequence[Ends], example: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What every partition reads and gives, of an example that is run; nothing of the model changes."""
    if not found:
        raise ValueError("partitions: at least one is needed")
    events: list[tuple[int, str, Any]] = []
    hooks: list[Any] = []

    def before(k: int, _: nn.Module, args: tuple[Any, ...]) -> None:
        events.append((k, "in", args[0]))

    def after(k: int, _: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        events.append((k, "out", y))

    for k, (first, last) in enumerate(found):
        hooks += [first.register_forward_pre_hook(partial(before, k)), last.register_forward_hook(partial(after, k))]
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        model(example)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    if [event[:2] for event in events] != [(k, way) for k in range(len(found)) for way in ("in", "out")]:
        said = ", ".join(f"{way} {k}" for k, way, _ in events)
        raise ValueError(
            f"partitions: must be run once each, in order, and not inside each other; the model ran {said or 'none'}"
        )
    tensors = [event[2] for event in events]
    if not all(isinstance(t, Tensor) for t in tensors):
        raise ValueError("partitions: each must read and give one tensor")
    return list(zip(tensors[::2], tensors[1::2], strict=True))
