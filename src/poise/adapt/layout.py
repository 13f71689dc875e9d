"""How a layer maps inputs to outputs, as far as what stands beside it must know: a map down to few numbers, and one up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from poise.modules import Rows

Kind = Literal["linear", "conv", "embedding"]


@dataclass(frozen=True)
class Layout:
    """Of one layer.

    Attributes:
        kind: "linear" (nn.Linear, and Conv1D of transformers), "conv" or "embedding".
        outputs, inputs: rows and columns of its weight as a matrix; a convolution's inputs are channels times kernel, an
            embedding's are its words.
        rows: between the weight as it is stored and that matrix.
        kernel: of a convolution.
    """

    kind: Kind
    outputs: int
    inputs: int
    rows: Rows
    kernel: tuple[int, ...] = ()

    @classmethod
    def of(cls, path: str, layer: nn.Module) -> Layout:
        """The layout of a layer.

        Raises:
            ValueError: it is of a kind that nothing can stand beside, and why.
        """
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise refused(path, layer, "has no floating-point weight")
        if type(layer).__name__ == "NonDynamicallyQuantizableLinear":
            raise refused(path, layer, "belongs to nn.MultiheadAttention, which reads its weight and never calls it")
        if isinstance(layer, nn.Embedding):
            if layer.max_norm is not None:
                raise refused(path, layer, "shortens its rows (max_norm) as it reads them")
            return cls("embedding", weight.shape[1], weight.shape[0], Rows(weight.shape[1], 1))
        if isinstance(layer, _ConvTransposeNd):
            raise refused(path, layer, "is a transposed convolution, which has no low-rank form of two convolutions here")
        if isinstance(layer, _ConvNd):
            if layer.groups > 1:
                raise refused(path, layer, f"has {layer.groups} groups, each with a matrix of its own")
            return cls("conv", weight.shape[0], weight[0].numel(), Rows.of(layer, weight), tuple(weight.shape[2:]))
        rows = Rows.of(layer, weight)
        if weight.ndim == 2 and (isinstance(layer, nn.Linear) or rows.groups):
            return cls("linear", rows.outputs, weight.numel() // rows.outputs, rows)
        raise refused(path, layer, "is no linear layer, convolution or embedding")

    @property
    def channels(self) -> int:
        """Of the input: what a map from inputs to outputs without a kernel reads."""
        return self.inputs if not self.kernel else self.inputs // torch.Size(self.kernel).numel()

    def down(self, layer: nn.Module, x: Tensor, matrix: Tensor) -> Tensor:
        """`matrix` (r, inputs) applied to the layer's input, as the layer applies its weight: r values where it has outputs."""
        if self.kind == "embedding":
            return F.embedding(x, matrix.T, getattr(layer, "padding_idx", None))  # whose word does not train
        if self.kind == "linear":
            return F.linear(x, matrix)
        conv: Any = layer  # its own stride, padding and dilation
        return conv._conv_forward(x, matrix.reshape(len(matrix), self.channels, *self.kernel), None)

    def up(self, h: Tensor, matrix: Tensor) -> Tensor:
        """`matrix` (outputs, r) applied to what `down` gives."""
        if self.kind != "conv":
            return F.linear(h, matrix)
        return torch.movedim(F.linear(torch.movedim(h, self.axis, -1), matrix), -1, self.axis)

    @property
    def axis(self) -> int:
        """The dimension of the outputs in the layer's output, from the end."""
        return -1 - len(self.kernel)

    def across(self, values: Tensor) -> Tensor:
        """One value for each output (outputs,) in a shape that multiplies the layer's output."""
        return values.reshape(-1, *[1] * len(self.kernel))


def refused(path: str, layer: nn.Module, why: str) -> ValueError:
    return ValueError(f"targets: {path!r} ({type(layer).__name__}) {why}; leave it out")
