"""How steep, how sharp and how curved the loss is around weights, each with its derivative."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .functional import Network, Weights

RADII = [r / 10 for r in range(1, 10)]  # the paper's


def gradient_norm(network: Network, leaves: Weights) -> tuple[float, Weights]:
    """`sum ||dL/dW||^2`, and its gradient with respect to the leaves."""
    grads = torch.autograd.grad(network.loss(leaves), list(leaves.values()), create_graph=True, allow_unused=True)
    value = torch.stack([g.square().sum() for g in grads if g is not None]).sum()
    return float(value.detach()), _slopes(value, leaves)


def sharpness(network: Network, leaves: Weights, directions: int, seed: int) -> tuple[float, Weights]:
    """The mean loss at random displacements of all weights together, of lengths 0.1 to 0.9, and its gradient."""
    generator = torch.Generator().manual_seed(seed)
    total, slopes = 0.0, {name: torch.zeros_like(w) for name, w in leaves.items()}
    count = len(RADII) * directions
    for radius in RADII:
        for _ in range(directions):
            drawn = {name: torch.randn(w.shape, generator=generator, dtype=torch.float64) for name, w in leaves.items()}
            length = math.sqrt(sum(float(d.square().sum()) for d in drawn.values()))
            loss = network.loss({name: w + (drawn[name] * (radius / length)).to(w) for name, w in leaves.items()}) / count
            total += float(loss.detach())
            for name, slope in _slopes(loss, leaves).items():
                slopes[name] += slope
    return total, slopes


def curve_curvature(curve: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """`sqrt(|y'|^2 |y''|^2 - <y', y''>^2) / |y'|^3` of a curve of vectors."""

    def velocity(t: Tensor) -> Tensor:
        return along(curve, t)[1]

    first, second = along(velocity, t)
    square = first @ first
    return ((square * (second @ second) - (first @ second) ** 2).clamp_min(0.0)).sqrt() / square**1.5


def along(function: Callable[[Tensor], Tensor], t: Tensor) -> tuple[Tensor, Tensor]:
    """Value and derivative of a function of one number."""
    found = torch.func.jvp(function, (t,), (torch.ones_like(t),))
    return found[0], found[1]


def _slopes(value: Tensor, leaves: Weights) -> Weights:
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return {name: slope for name, slope in zip(leaves, found, strict=True) if slope is not None}
