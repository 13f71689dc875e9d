"""Networks whose outputs are the weights of another one, for given hyper-parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

Form = Literal["linear", "factorized", "mlp"]


class Hypernetwork(nn.Module):
    """`w_phi(lam)`: the weights of a model, by name, as a function of h hyper-parameters.

        linear        w = b + A lam                     A is (weights, h)
        factorized    w = b + U V lam                   through `width` numbers: for many hyper-parameters
        mlp           w = b + U relu(V lam + c)         `width` hidden units

    b begins as the weights that the model has; A, U, V and c are drawn with standard deviation `scale`, but V of "factorized"
    with `1 / sqrt(h)`: of a product of two small factors neither would grow.
    """

    def __init__(
        self, model: nn.Module, hypers: int, form: Form = "linear", width: int = 50, scale: float = 0.01, seed: int = 0
    ) -> None:
        super().__init__()
        if form not in get_args(Form):
            raise ValueError(f"form={form!r}: must be one of {', '.join(get_args(Form))}")
        if width < 1 or hypers < 1:
            raise ValueError(f"width={width}, hypers={hypers}: both must be at least 1")
        shapes = {name: p.shape for name, p in model.named_parameters()}
        if not shapes:
            raise ValueError("model: has no parameters to generate")
        self.form, self.shapes = form, shapes
        self.b = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
        generator = torch.Generator().manual_seed(seed)

        def drawn(size: float, *shape: int) -> nn.Parameter:
            return nn.Parameter((size * torch.randn(shape, generator=generator, dtype=torch.float64)).to(self.b))

        inner = hypers if form == "linear" else width
        self.U = drawn(scale, self.b.numel(), inner)
        if form != "linear":
            self.V = drawn(scale if form == "mlp" else hypers**-0.5, width, hypers)
        if form == "mlp":
            self.c = drawn(scale, width)

    def forward(self, lam: Tensor) -> dict[str, Tensor]:
        z = lam.reshape(-1)
        if self.form != "linear":
            z = self.V @ z
        if self.form == "mlp":
            z = (z + self.c).relu()
        pieces = (self.b + self.U @ z).split([shape.numel() for shape in self.shapes.values()])
        return {name: piece.reshape(shape) for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)}


@dataclass(frozen=True)
class Generated:
    """A model with generated weights: call it as the model, and find its weights by name in `weights`."""

    model: nn.Module
    weights: dict[str, Tensor]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(self.model, self.weights, args, kwargs)

    def parameters(self) -> Iterator[Tensor]:
        return iter(self.weights.values())
