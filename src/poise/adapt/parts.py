"""Several LoRAs beside each layer, by name: which of them act, and which train."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from .adapter import LowRank
from .attaching import adapters


@contextmanager
def acting(model: nn.Module, *names: str, train: str | Sequence[str] | None = None) -> Iterator[None]:
    """Within it these parts act and no others, and of them only some train. Nothing is copied.

        with acting(model, "content", "style", train="style"):
            loss(model, batch).backward()

    Args:
        names: of parts of the method; none: the base acts.
        train: those of `names` that get gradients; None: all of them. Parameters that are frozen anyway remain so.

    Raises:
        ValueError: the model is not adapted, or by a method without parts; no such part; a part that trains and does not act.
    """
    trained = names if train is None else (train,) if isinstance(train, str) else tuple(train)
    if idle := next((name for name in trained if name not in names), None):
        raise ValueError(f"train={train!r}: {idle!r} does not act; of {', '.join(names) or 'none'} some or all can train")
    for name in names:
        part_of(model, name)
    before: list[tuple[LowRank, bool]] = []
    frozen: list[nn.Parameter] = []
    for adapter in adapters(model).values():
        for name, part in adapter.parts().items():
            before.append((part, part.active))
            part.active = name in names
            if name not in trained:
                frozen += [p for p in part.parameters() if p.requires_grad]
    for p in frozen:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for part, was in before:
            part.active = was
        for p in frozen:
            p.requires_grad_(True)


def part_of(model: nn.Module, name: str) -> dict[str, LowRank]:
    """By path of the layer, its part of this name.

    Raises:
        ValueError: the model is not adapted, or by a method without such a part.
    """
    found: dict[str, LowRank] = {}
    for path, adapter in adapters(model).items():
        parts = adapter.parts()
        if name not in parts:
            known = f"has the parts {', '.join(parts)}" if parts else "has no parts"
            raise ValueError(f"{name!r}: what stands at {path!r} {known}")
        found[path] = parts[name]
    return found
