"""A network of one hidden layer whose inputs also go straight to the outputs."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class BypassMLP(nn.Module):
    """One hidden layer with bypass weights: `y = W_oh f(W x + b) + W_oi x + c`.

    The hidden units need only model what a linear map cannot.

    Args:
        inputs, hidden, outputs: units of each layer.
        activation: f, one unit by one; tanh.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, activation: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, hidden)
        self.activation = nn.Tanh() if activation is None else activation
        self.output = nn.Linear(hidden, outputs)
        self.bypass = nn.Linear(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.activation(self.hidden(x))) + self.bypass(x)
