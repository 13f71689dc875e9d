"""SimbaV2's networks: weights and features on the unit sphere, and the projection that keeps them there with any optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import relu
from torch.utils.hooks import RemovableHandle

from poise.catalog import Paper, method
from poise.linalg.lengths import unit

# Shorter vectors are divided by this, as in the authors' code.
FLOOR = 1e-8


@method(
    "hyperspherical",
    family="training",
    kind="projection",
    paper=Paper("Hyperspherical Normalization for Scalable Deep Reinforcement Learning", arxiv="2502.15280", year=2025),
    mutant=("weight.flatten(1), dim=1", "weight.flatten(1), dim=0"),
)
def keep_unit_rows(optimizer: torch.optim.Optimizer, weights: nn.Module | Iterable[nn.Parameter]) -> RemovableHandle:
    """After every step of `optimizer`, bring each row of the weights back to length 1.

        w_i <- w_i / max(||w_i||, 1e-8)            for each output unit i; now, and after every step

    Any optimizer will do; its state is left as it is. Up to second order in lr a step of SGD followed by this is a step along
    the sphere, and decay of such weights does nothing, so leave it at 0. In bfloat16 lengths are 1 up to its spacing.

    Args:
        optimizer: the one that moves the weights.
        weights: a module, whose `HyperDense` layers are meant, or parameters, each seen as (out, rest).

    Returns:
        A handle; `handle.remove()` ends it.

    Raises:
        TypeError: no weights of two dimensions or more.
        ValueError: there are none, or the optimizer does not hold one of them.

    Source: "Hyperspherical Normalization for Scalable Deep Reinforcement Learning" (arXiv 2502.15280) and its code.
    """
    if isinstance(weights, nn.Module):
        kept: list[Any] = [layer.weight for layer in weights.modules() if isinstance(layer, HyperDense)]
    else:
        kept = list(weights)
    if not kept:
        raise ValueError("weights: there is no HyperDense layer, or no parameter, whose rows could be kept at length 1")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for place, weight in enumerate(kept):
        if not isinstance(weight, Tensor) or weight.ndim < 2:
            raise TypeError(f"weights[{place}] must be a parameter of two dimensions or more, got {weight!r}")
        if id(weight) not in held:
            raise ValueError(f"weights[{place}], of shape {tuple(weight.shape)}, is not among the optimizer's parameters")

    def project(*_: Any) -> None:
        for weight in kept:
            _project(weight)

    project()
    return optimizer.register_step_post_hook(project)


@torch.no_grad()
def _project(weight: Tensor) -> None:
    weight.copy_(unit(weight.flatten(1), dim=1, floor=FLOOR).reshape(weight.shape))


def _sphere(x: Tensor) -> Tensor:
    return unit(x, floor=FLOOR)


class HyperDense(nn.Linear):
    """A linear layer without bias whose weight rows have length 1; orthogonal at first. `keep_unit_rows` keeps them so."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        nn.init.orthogonal_(self.weight)
        _project(self.weight)


class Scaler(nn.Module):
    """`y = s * (init / scale) * x`, s (dim,) learned, `scale` at first.

    What comes out is `init * x` at first, and a step of lr in s changes it by `lr * init / scale * x`: scale sets the pace.
    """

    def __init__(self, dim: int, init: float = 1.0, scale: float = 1.0) -> None:
        super().__init__()
        if scale == 0:
            raise ValueError("scale=0.0: init / scale must be a number")
        self.scale = nn.Parameter(torch.full((dim,), float(scale)))
        self.ratio = init / scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.ratio * x


class HyperEmbedder(nn.Module):
    """Inputs onto the sphere: `unit(Scaler(W unit([x, shift])))`.

    The constant beside x keeps its length in the direction. Scaler at sqrt(2 / dim).

    Args:
        in_features: of x.
        dim: of the sphere.
        shift: 3.
    """

    def __init__(self, in_features: int, dim: int, shift: float = 3.0) -> None:
        super().__init__()
        self.shift = shift
        self.dense = HyperDense(in_features + 1, dim)
        self.scaler = Scaler(dim, math.sqrt(2 / dim), math.sqrt(2 / dim))

    def forward(self, x: Tensor) -> Tensor:
        shifted = torch.cat([x, x.new_full((*x.shape[:-1], 1), self.shift)], dim=-1)
        return _sphere(self.scaler(self.dense(_sphere(shifted))))


class HyperBlock(nn.Module):
    """A residual block that moves along the sphere: `h = unit(W2 (relu(Scaler(W1 x)) + 1e-8))`, `x <- unit(x + a (h - x))`.

    The hidden layer is `expansion` times as wide, its scaler at sqrt(2 / dim) / sqrt(expansion); a, one number for each
    feature, is a Scaler that starts at 1 / (blocks + 1) with scale 1 / sqrt(dim).

    Args:
        dim: of the sphere.
        blocks: in the whole network.
        expansion: 4.
    """

    def __init__(self, dim: int, blocks: int = 1, expansion: int = 4) -> None:
        super().__init__()
        inner = math.sqrt(2 / dim) / math.sqrt(expansion)
        self.up = HyperDense(dim, expansion * dim)
        self.scaler = Scaler(expansion * dim, inner, inner)
        self.down = HyperDense(expansion * dim, dim)
        self.alpha = Scaler(dim, 1 / (blocks + 1), 1 / math.sqrt(dim))

    def forward(self, x: Tensor) -> Tensor:
        h = _sphere(self.down(relu(self.scaler(self.up(x))) + 1e-8))  # not all zeros, which have no direction
        return _sphere(x + self.alpha(h - x))


class HyperHead(nn.Module):
    """Features to outputs: `W2 Scaler(W1 x) + b`, the Scaler at 1."""

    def __init__(self, dim: int, out_features: int) -> None:
        super().__init__()
        self.dense = HyperDense(dim, dim)
        self.scaler = Scaler(dim)
        self.out = HyperDense(dim, out_features)
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.scaler(self.dense(x))) + self.bias
