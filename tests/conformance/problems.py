"""Weights and gradients to feed an optimizer, and the loop that feeds them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Grads = list[list[Tensor | None]]

# A matrix that every state format encodes (8192 elements, rows of 128), and smaller tensors, whose state stays float32.
SHAPES: tuple[tuple[int, ...], ...] = ((64, 128), (64,), (10, 64), (8, 4, 3, 3))


def draw(
    shapes: Iterable[tuple[int, ...]] = SHAPES,
    steps: int = 6,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    missing: Iterable[tuple[int, int]] = (),
) -> tuple[list[Tensor], Grads]:
    """Random weights and, for every step, random gradients; `missing` lists (step, parameter) pairs that get none."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    shapes = list(shapes)
    params = [normal(shape) for shape in shapes]
    grads: Grads = [[normal(shape) for shape in shapes] for _ in range(steps)]
    for step, index in missing:
        grads[step][index] = None
    return params, grads


def leaves(params: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[torch.nn.Parameter]:
    """Fresh trainable copies of `params`."""
    return [torch.nn.Parameter(p.detach().clone().to(dtype or p.dtype)) for p in params]


def play(
    optimizer: torch.optim.Optimizer,
    params: Sequence[Tensor],
    grads: Grads,
    rates: Sequence[float] | None = None,
) -> list[Tensor]:
    """Step once a row of gradients, every group's lr at `rates[t]` times its first value; returns copies of the weights."""
    first = [group["lr"] for group in optimizer.param_groups]
    for t, row in enumerate(grads):
        if rates is not None:
            for group, lr in zip(optimizer.param_groups, first, strict=True):
                group["initial_lr"] = lr  # as torch's schedulers do
                group["lr"] = lr * rates[t]
        for p, g in zip(params, row, strict=True):
            p.grad = None if g is None else g.to(p.dtype).clone()
        optimizer.step()
    return [p.detach().clone() for p in params]


def distance(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Largest difference of any entry; infinite where one of them is not a number."""
    worst = 0.0
    for a, b in zip(found, wanted, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if a.numel():
            gap = (a.detach().double() - b.detach().double()).abs().nan_to_num(nan=float("inf"))
            worst = max(worst, float(gap.max()))
    return worst


def same(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    """Bitwise equal, dtypes and shapes included."""
    return all(a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
