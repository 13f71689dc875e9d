"""A weighted sum of models that is not there until it is asked for, a tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from .protocol import wide


class Soup(Mapping[str, Tensor]):
    """theta(alpha) = sum_i alpha_i theta_i. Reading a name reads that tensor of each model in turn and makes a new one.

    Floating tensors are summed in float64, rounded once to the first model's dtype; others are the first model's. A model of
    weight 0 is not read.
    """

    def __init__(self, models: Sequence[Mapping[str, Tensor]], alpha: Sequence[float]) -> None:
        if not models or len(models) != len(alpha):
            raise ValueError(f"alpha: {len(alpha)} weights for {len(models)} models; there must be one for each")
        self.models, self.alpha = models, tuple(float(a) for a in alpha)

    def __getitem__(self, name: str) -> Tensor:
        first = self.models[0][name]
        if not first.is_floating_point():
            return first.clone()
        used = [(m, a) for m, a in zip(self.models, self.alpha, strict=True) if a != 0]
        if not used:
            return torch.zeros_like(first)
        total = torch.zeros_like(first, dtype=torch.float64)
        for model, a in used:
            total.add_(wide(model[name]), alpha=a)
        return total.to(first.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.models[0])

    def __len__(self) -> int:
        return len(self.models[0])

    @torch.no_grad()
    def into(self, module: nn.Module) -> nn.Module:
        """Write the tensors into a module of the same names, one after another; returns it."""
        for name, target in module.state_dict().items():
            target.copy_(self[name])
        return module
