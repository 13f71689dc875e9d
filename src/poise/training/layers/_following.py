"""What happens round an optimizer's step where its parameters are compressed displacements of a layer's weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from poise.memory.rounding import key_of
from poise.optim import Optimizer
from poise.optim.transforms.step import decay

from .. import weights
from ..driver import Driver


class Compressed(Protocol):
    """A layer whose weight takes in what an optimizer did to its `compressed`."""

    compressed: torch.nn.Parameter
    sketch: Any

    def take_in(self, optimizer: torch.optim.Optimizer, shrink: float = 0.0) -> None: ...

    def followed(self, ever: bool) -> None: ...


class Following:
    """Hooks around an optimizer's step, until `remove()`.

    Args:
        optimizer: around drivers, the innermost one is followed.
        layers: whose weights take in what the step did.
        scaled: parameters of which a step is to do `factor` times what it does, decay apart.
        factor: positive.

    Raises:
        ValueError: see `CompAct.follow`.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, layers: Sequence[Any], scaled: Sequence[Tensor], factor: float
    ) -> None:
        if not 0.0 < factor < math.inf:
            raise ValueError(f"output_scale={factor}: must be positive and finite")
        self.optimizer = optimizer.base if isinstance(optimizer, Driver) else optimizer
        self.layers: list[Compressed] = list(layers)
        groups = self._groups()
        for number, layer in enumerate(self.layers):
            if id(layer.compressed) not in groups:
                raise ValueError(
                    f"optimizer: it does not hold `compressed` of layer {number} of {len(self.layers)}; make it after attach()"
                )
        self.scaled = [p for p in scaled if id(p) in groups]
        self.factor = factor
        for group in {id(group): group for group in groups.values()}.values():
            shrinkage(self.optimizer, group)
        for layer in self.layers:
            layer.take_in(self.optimizer)  # what training without following has left there
            layer.followed(True)
        self._before: list[Tensor | None] = []
        self._handles = (
            self.optimizer.register_step_pre_hook(self._remember),
            self.optimizer.register_step_post_hook(self._settle),
        )

    def remove(self) -> None:
        """End it."""
        for handle in self._handles:
            handle.remove()
        for layer in self.layers:
            layer.followed(False)

    def _groups(self) -> dict[int, Mapping[str, Any]]:
        return {id(p): group for group in self.optimizer.param_groups for p in group["params"]}

    @torch.no_grad()
    def _remember(self, *_: Any) -> None:
        self._before = [weights.read(self.optimizer, p).clone() for p in self.scaled]

    @torch.no_grad()
    def _settle(self, *_: Any) -> None:
        groups = self._groups()
        for number, (p, before) in enumerate(zip(self.scaled, self._before, strict=True)):
            if p.grad is not None and before is not None:
                rest = before * (1 - shrinkage(self.optimizer, groups[id(p)]))
                moved = rest + self.factor * (weights.read(self.optimizer, p) - rest)
                weights.write(self.optimizer, p, moved, key_of(number, "output", self.layers[0].sketch.steps))
        self._before = []
        for layer in self.layers:
            if layer.compressed.grad is not None:  # what has no gradient is left alone, by decay too
                layer.take_in(self.optimizer, shrinkage(self.optimizer, groups[id(layer.compressed)]))
                layer.sketch.steps += 1


def shrinkage(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> float:
    """The share that decoupled decay takes off the weights of `group` in one step.

    Raises:
        ValueError: there is decay of another kind.
    """
    if isinstance(optimizer, Optimizer):
        decays = [link for link in optimizer.rule_of(group) if isinstance(link, decay)]
        if decays:
            return sum(link.scalars(1, group)["shrink"] for link in decays)
    elif isinstance(optimizer, torch.optim.AdamW):
        return float(group["lr"]) * float(group["weight_decay"])
    if float(group.get("weight_decay", 0.0)):
        raise ValueError(
            f"weight_decay={group['weight_decay']}: that of {type(optimizer).__name__} is not decoupled and cannot act on "
            "weights that it does not hold; set it to 0, or take poise.optim.AdamW"
        )
    return 0.0
