"""Parameter lists that optimizers are timed on, with gradients in place; everything is drawn from a seed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

Shapes = list[tuple[int, ...]]

# The four matrices of a transformer block of width 512, as torch stores them: (outputs, inputs).
BLOCK: Shapes = [(1536, 512), (512, 512), (2048, 512), (512, 2048)]


def _small(count: int = 300, low: int = 64, high: int = 4096) -> Shapes:
    """Vectors whose sizes are spread evenly in the logarithm, in an order without pattern."""
    sizes = [round(low * (high / low) ** (i / (count - 1))) for i in range(count)]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return [(sizes[i],) for i in order]


LISTS: dict[str, Shapes] = {
    "gpt": [(8192, 512), *[*BLOCK, (512,), (512,)] * 8],  # 29.4M parameters in 49 tensors
    "hidden": BLOCK * 8,  # its 32 block matrices
    "one of each": BLOCK,  # for optimizers that take minutes on all of them
    "300 small": _small(),
    "trajectory": [(512, 512), (1536, 512)],
}


def count(name: str) -> int:
    """Parameters in a list."""
    return sum(math.prod(shape) for shape in LISTS[name])


def make(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Parameter]:
    """Parameters of the size that initialization gives them (0.02), with normal gradients of size 0.01."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for shape in LISTS[name]:
        p = Parameter((torch.randn(shape, generator=generator) * 0.02).to(dtype))
        p.grad = (torch.randn(shape, generator=generator) * 0.01).to(dtype)
        made.append(p)
    return made


def gradients(params: Sequence[Tensor], steps: int, seed: int = 1) -> Iterator[list[Tensor]]:
    """Gradients as training makes them, as far as a state format cares: sizes that differ by orders of magnitude within a block
    of neighbours, mostly noise, and a drift that a moving average has to find in it.

    With row and column sizes `r_i, c_j ~ exp(N(0, 1))` and a fixed direction `d ~ N(0, 1)`, step t yields
    `g_ij = 1e-3 r_i c_j (n_ij + 0.3 d_ij)` with fresh `n ~ N(0, 1)`: entries spread over about four decades.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: Sequence[int]) -> Tensor:
        return torch.randn(*shape, generator=generator)

    sizes = [1e-3 * (normal((p.shape[0], 1)) + normal((1, p.shape[1]))).exp() for p in params]
    drifts = [0.3 * normal(p.shape) for p in params]
    for _ in range(steps):
        yield [size * (normal(size.shape) + drift) for size, drift in zip(sizes, drifts, strict=True)]
