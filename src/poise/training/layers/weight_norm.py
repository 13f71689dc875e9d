"""Weight normalization: the length and the direction of each row as parameters of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from poise.catalog import Paper, choice, method
from poise.linalg.lengths import lengths
from poise.modules import Rows

from .reparameterization import Reparameterization


@method(
    "weight-norm",
    family="training",
    kind="parametrization",
    paper=Paper(
        "Weight Normalization: A Simple Reparameterization to Accelerate Training of Deep Neural Networks",
        arxiv="1602.07868",
        year=2016,
    ),
    tune={"exponential": choice(False, True)},
    mutant=("gain.unsqueeze(1) / lengths(matrix, 1)", "gain.unsqueeze(1)"),
)
class WeightNorm(Reparameterization):
    """Each output unit's weights as a length and a direction: `w = g v / ||v||`.

        w  = g v / ||v||                                   v of the shape of w, g (outputs,)
        dg = <dw, v> / ||v||
        dv = g / ||v|| dw - g dg / ||v||^2 v               so that <dv, v> = 0

    The gradient of v stands at right angles to v: under plain SGD its length can only grow, and with it shrinks the step.

        reparameterize(model, WeightNorm)
        data_dependent_init(model, batch)                  # if you like; without it the model starts as it was

    Args:
        rows: how the layer stores its weight; `reparameterize` gives it.
        exponential: store s and use g = exp(s), so that lengths are positive and move by factors.

    Raises:
        ValueError: (from `reparameterize`) a row is zero: without a direction it has no gradient.

    g has one dimension, `(outputs,)`, where torch's weight_norm has `(outputs, 1, ...)`: optimizers that go by the number of
    dimensions then see a vector. Source: "Weight Normalization: A Simple Reparameterization to Accelerate Training of Deep
    Neural Networks" (arXiv 1602.07868).
    """

    def __init__(self, rows: Rows, exponential: bool = False) -> None:
        super().__init__(rows)
        self.exponential = exponential

    def make(self, matrix: Tensor, *beside: Tensor) -> Tensor:
        (gain,) = beside
        gain = gain.exp() if self.exponential else gain
        return matrix * (gain.unsqueeze(1) / lengths(matrix, 1))

    def split(self, matrix: Tensor) -> tuple[Tensor, ...]:
        gain = lengths(matrix, 1).squeeze(1)
        return (gain.log() if self.exponential else gain,)

    def check(self, matrix: Tensor, name: str) -> None:
        self.refuse_zeros(matrix, 1, name)

    def extra_repr(self) -> str:
        return f"exponential={self.exponential}"


@torch.no_grad()
def data_dependent_init(
    model: nn.Module,
    *inputs: object,
    init_scale: float = 1.0,
    std: float | None = 0.05,
    generator: torch.Generator | None = None,
) -> list[str]:
    """Set lengths and biases of weight-normalized layers so that on one batch their outputs have mean 0 and variance 1.

        v ~ N(0, std^2);  t = <v, x> / ||v||;  g = init_scale / sqrt(var[t] + eps);  b = -mean[t] g

    Layer by layer, in one forward pass `model(*inputs)`: each layer sees what the layers before it give after their own
    initialization. Mean and (biased) variance of each output run over the batch and all positions; eps is 1e-10, of
    convolutions 1e-8, as in the authors' code. A layer without bias keeps its mean: follow it with `MeanOnlyBatchNorm`, and
    call this in training mode. A layer used several times is set at its first use.

    Args:
        model: with layers that `reparameterize(model, WeightNorm)` has changed.
        inputs: of its forward pass.
        init_scale: the standard deviation that outputs get.
        std: of the directions drawn, 0.05; None keeps those that are there.
        generator: of the draws.

    Returns:
        The paths of the layers that were set. Those that the batch did not reach are left as they were, and so are embeddings,
        whose rows are not output units, and what is tied to one.

    Raises:
        ValueError: there is no such layer; a layer has one value for each output, and so no variance.
    """
    found = _weight_normed(model)
    if not found:
        raise ValueError("data_dependent_init: no layer is weight-normalized; reparameterize(model, WeightNorm) comes first")
    done: dict[int, str] = {}

    def on_reaching(layer: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        path, held = found[layer]
        if id(held) in done:
            return
        done[id(held)] = path
        kind, (gain, direction) = held[0], (held.original0, held.original1)
        if std is not None:
            direction.normal_(0.0, std, generator=generator)
        bias = layer._parameters.get("bias")
        gain.fill_(0.0 if kind.exponential else 1.0)
        if bias is not None:
            bias.zero_()
        t = _by_output(layer, layer.forward(*args, **kwargs).double())
        if t.shape[1] < 2:
            raise ValueError(f"data_dependent_init: {path!r} has one value for each output, so no variance; use a larger batch")
        scale = init_scale / (t.var(1, correction=0) + (1e-8 if isinstance(layer, _ConvNd) else 1e-10)).sqrt()
        gain.copy_(scale.log() if kind.exponential else scale)
        if bias is not None:
            bias.copy_(-t.mean(1) * scale)

    hooks = [layer.register_forward_pre_hook(on_reaching, with_kwargs=True) for layer in found]
    try:
        model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return list(done.values())


def _weight_normed(model: nn.Module) -> dict[nn.Module, tuple[str, Any]]:
    """The layers whose outputs g scales, each with its path and what is stored of its weight."""
    named: list[tuple[str, Any]] = list(model.named_modules())
    held = {layer: (path, layer.parametrizations["weight"]) for path, layer in named if is_parametrized(layer, "weight")}
    tables = {id(one) for layer, (_, one) in held.items() if isinstance(layer, nn.Embedding | nn.EmbeddingBag)}
    return {
        layer: (path, one)
        for layer, (path, one) in held.items()
        if len(one) == 1 and isinstance(one[0], WeightNorm) and id(one) not in tables
    }


def _by_output(layer: nn.Module, t: Tensor) -> Tensor:
    """What a layer gives as (outputs, values): features stand last, a convolution's channels before its positions."""
    channels = -1 - len(layer.kernel_size) if isinstance(layer, _ConvNd) else -1
    return t.movedim(channels, 0).flatten(1)
