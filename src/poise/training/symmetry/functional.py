"""A model and its loss on one batch, as functions of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Weights = dict[str, Tensor]
Loss = Callable[[nn.Module], Tensor]


class Network:
    """The loss, and what layers see, at weights by name; these may be kept in more bits than the model's."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        self.model, self._call = model, _Call(model, loss)
        self.dtypes = {name: p.dtype for name, p in model.named_parameters()}

    def loss(self, weights: Mapping[str, Tensor]) -> Tensor:
        given = {f"model.{name}": w.to(self.dtypes[name]) for name, w in weights.items()}
        return torch.func.functional_call(self._call, given, ())

    def seen(self, weights: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
        """What the linear layer `name` takes in, (n, in), and gives out, (n, out)."""
        taken: list[Tensor] = []
        given: list[Tensor] = []

        def look(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            taken.append(args[0].reshape(-1, args[0].shape[-1]))
            given.append(out.reshape(-1, out.shape[-1]))

        hook = self.model.get_submodule(name).register_forward_hook(look)
        try:
            self.loss(weights)
        finally:
            hook.remove()
        if not taken:
            raise ValueError(f"loss: it does not come through {name!r}, so nothing is known of what that layer sees")
        computing = weights[f"{name}.weight"].dtype
        return torch.cat(taken).to(computing), torch.cat(given).to(computing)


@contextmanager
def looked_at(model: nn.Module) -> Iterator[None]:
    """Within it the model is in eval mode, so that its loss is one function and no statistics are taken."""
    modes = [(part, part.training) for part in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for part, mode in modes:
            part.training = mode


class _Call(nn.Module):
    """The loss of a model as a module around it, for `functional_call`."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.of = model, loss

    def forward(self) -> Tensor:
        return self.of(self.model)
