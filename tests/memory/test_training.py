"""Adam with its moments kept by each format, on a small network: what must not matter, and what must."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from poise.memory import Codec, Kind, Linear8, get

SIZES = [64, 128, 128, 10]
STEPS = 150


@cache
def batches() -> list[tuple[Tensor, Tensor]]:
    """Noisy labels of a random linear teacher, fresh ones for each step; inputs of unequal size, so that gradients are too."""
    g = torch.Generator().manual_seed(0)
    spread, teacher = torch.exp(torch.randn(64, generator=g)), torch.randn(64, 10, generator=g) * 0.15
    made = []
    for _ in range(STEPS):
        x = torch.randn(128, 64, generator=g) * spread
        made.append((x, (x @ teacher + torch.randn(128, 10, generator=g)).argmax(1)))
    return made


def loss_of(flat: Tensor, x: Tensor, y: Tensor) -> Tensor:
    at = 0
    for i, (fan_in, fan_out) in enumerate(pairwise(SIZES)):
        weight = flat[at : at + fan_in * fan_out].view(fan_out, fan_in)
        at += fan_in * fan_out
        x = F.linear(x, weight, flat[at : at + fan_out])
        at += fan_out
        x = x.relu() if i < 2 else x
    return F.cross_entropy(x, y)


def train(codec: Codec | None, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999)) -> float:
    """The mean loss of the last steps."""
    g = torch.Generator().manual_seed(1)
    size = sum(i * o + o for i, o in pairwise(SIZES))
    p = (torch.randn(size, generator=g) * 0.08).requires_grad_()
    m, v = torch.zeros(size), torch.zeros(size)

    def kept(x: Tensor, kind: Kind) -> Tensor:
        if codec is None:
            return x
        blocks = F.pad(x, (0, -size % codec.block)).view(-1, codec.block) if codec.block > 1 else x
        bits = torch.randint(0, 65536, blocks.shape, generator=g, dtype=torch.int32)
        return codec.decode(codec.encode(blocks, kind, bits), kind).reshape(-1)[:size]

    last = []
    for t, (x, y) in enumerate(batches(), 1):
        loss = loss_of(p, x, y)
        (grad,) = torch.autograd.grad(loss, p)
        m = betas[0] * m + (1 - betas[0]) * grad
        v = betas[1] * v + (1 - betas[1]) * grad**2
        step = (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + 1e-8)
        p = (p - lr * step).detach().requires_grad_()
        m, v = kept(m, "signed"), kept(v, "nonneg")
        last.append(loss.item())
    return sum(last[-20:]) / 20


@cache
def reference() -> float:
    return train(None)


@pytest.mark.parametrize("name, within", [("bf16", 0.02), ("int8", 0.02), ("int8-dynamic", 0.03), ("int4", 0.12)])
def test_the_format_of_the_moments_does_not_change_the_loss(name: str, within: float) -> None:
    assert train(get(name)) == pytest.approx(reference(), rel=within)


class PlainLinear(Linear8):
    """Second moments on equal steps, with codes that may fall to zero."""

    def encode(self, x: Tensor, kind: Kind, bits: Tensor | None = None) -> dict[str, Tensor]:
        if kind == "signed":
            return super().encode(x, "signed")
        scale = x.amax(1, keepdim=True)
        return {"codes": torch.round(x / scale * 255).to(torch.uint8), "scale": scale}

    def decode(self, parts: Mapping[str, Tensor], kind: Kind) -> Tensor:
        if kind == "signed":
            return super().decode(parts, "signed")
        return parts["codes"].float() / 255 * parts["scale"]


def test_plain_linear_second_moments_ruin_the_same_run() -> None:
    """What the floor at code 1 and the companding are for: a zero in the denominator is a step of m / eps."""
    assert not train(PlainLinear()) < 2 * reference()
