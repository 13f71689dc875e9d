"""What earlier blocks of a model told in the forward pass under way, for layers that come after them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Earlier:
    """States of blocks of layers, one for each block, told by its first layer and heard by those of later blocks.

    They last until the next forward pass begins. Where activation checkpointing runs layers once more in the backward pass,
    each hears what it heard before; it is told apart by its own state, which must be the one of then.
    """

    def __init__(self) -> None:
        self.told: dict[int, Tensor] = {}
        self.heard: dict[int, list[tuple[Tensor, tuple[Tensor, ...]]]] = {}  # by layer: its own state, in brief, and the others
        self.with_gradients = False

    def begin(self) -> None:
        """A forward pass begins."""
        if not _in_backward():
            self.told.clear()
            self.heard.clear()

    def visit(self, layer: int, block: int, opens: bool, state: Tensor) -> tuple[Tensor, ...]:
        """What earlier blocks have told, in their order.

        Args:
            layer, block: numbers, the first layer's being 0.
            opens: whether the layer is the first of its block, whose state later ones hear.
            state: of the layer, (..., n).

        Raises:
            RuntimeError: the layer runs once more in a backward pass, and what it heard before is not known any more.
        """
        if _in_backward():
            return self._again(layer, state) if block else ()
        if opens and layer == 0:
            self.begin()  # also where a part of the model is called alone
        others = tuple(self.told[b] for b in sorted(self.told) if b < block)
        self.with_gradients = torch.is_grad_enabled()
        self.heard.setdefault(layer, []).append((_brief(state), others))
        if opens:
            self.told[block] = state
        return others

    def _again(self, layer: int, state: Tensor) -> tuple[Tensor, ...]:
        brief = _brief(state)
        for known, others in self.heard.get(layer, ()):
            if known.shape == brief.shape and torch.allclose(known, brief, rtol=0, atol=1e-5 * float(known.abs().max())):
                if others and not self.with_gradients:
                    raise RuntimeError(
                        "activation checkpointing ran this model's forward pass without gradients, so those through the states "
                        "of earlier blocks would be lost: give checkpoint(..., use_reentrant=False), or attach with blocks=1"
                    )
                return others
        raise RuntimeError(
            "activation checkpointing runs a layer once more, and its forward pass was not the model's last one, or one with "
            "the first layer used twice: take a backward pass after each forward pass, leave out checkpointing, or attach with "
            "blocks=1"
        )

    def __reduce__(self) -> Any:
        return Earlier, ()  # a copy is of no pass


def _brief(state: Tensor) -> Tensor:
    """Few numbers that differ where the states do."""
    rows = state.detach().reshape(-1, state.shape[-1])
    return torch.stack([rows.sum(0), rows[-1:].sum(0)])


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1  # as torch.utils.checkpoint asks
