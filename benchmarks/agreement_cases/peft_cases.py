"""Against peft: LoRA and DoRA beside two layers, trained by the same optimizer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from poise.adapt import DoRA, LoRA, adapters, attach

from .case import Case, Problem, Side, Trajectory, copies

RANK, ALPHA = 3, 4.5
LAYERS = Problem(((10, 12), (9, 10)), steps=40)


class Net(nn.Module):
    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 10, dtype=problem.dtype), nn.Linear(10, 9, dtype=problem.dtype)
        generator = torch.Generator().manual_seed(problem.seed)
        with torch.no_grad():
            for layer, start in zip((self.first, self.second), problem.start(), strict=True):
                layer.weight.copy_(0.3 * start)
                layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator, dtype=problem.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def factors(problem: Problem) -> list[tuple[Tensor, Tensor]]:
    """A and B of both layers at the start; B is zero, as with both."""
    generator = torch.Generator().manual_seed(problem.seed + 1)
    return [
        (torch.randn(RANK, inputs, generator=generator, dtype=problem.dtype), torch.zeros(outputs, RANK, dtype=problem.dtype))
        for outputs, inputs in problem.shapes
    ]


def ours(method: type[LoRA], stabilized: bool) -> Side:
    def run(problem: Problem, _: Any) -> Trajectory:
        net = Net(problem)
        attach(net, method(rank=RANK, alpha=ALPHA, rank_stabilized=stabilized), nn.Linear)
        held: list[Any] = list(adapters(net).values())
        return trained(problem, net, [[a.lora_A, a.lora_B, getattr(a, "magnitude", None)] for a in held])

    return run


def by_peft(dora: bool, stabilized: bool) -> Side:
    def run(problem: Problem, module: Any) -> Trajectory:
        config = module.LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=["first", "second"],
            use_dora=dora,
            use_rslora=stabilized,
        )
        net = module.get_peft_model(Net(problem), config).double()
        layers = [net.base_model.model.first, net.base_model.model.second]
        parts = [
            [
                layer.lora_A["default"].weight,
                layer.lora_B["default"].weight,
                layer.lora_magnitude_vector["default"].weight if dora else None,
            ]
            for layer in layers
        ]
        return trained(problem, net, parts)

    return run


def trained(problem: Problem, net: nn.Module, parts: list[list[Any]]) -> Trajectory:
    with torch.no_grad():
        for (down, up, _), start in zip(parts, factors(problem), strict=True):
            down.copy_(start[0])
            up.copy_(start[1])
    params = [p for layer in parts for p in layer if p is not None]
    generator = torch.Generator().manual_seed(problem.seed + 2)
    opt = torch.optim.AdamW(params, lr=1e-2)
    found = [copies(params)]
    for _ in range(problem.steps):
        x = torch.randn(16, 12, generator=generator, dtype=problem.dtype)
        opt.zero_grad()
        (net(x) - x[:, :9].sin()).square().mean().backward()
        opt.step()
        found.append(copies(params))
    return found


def case(rule: str, method: type[LoRA], stabilized: bool) -> Case:
    scale = ALPHA / (math.sqrt(RANK) if stabilized else RANK)
    return Case(
        rule,
        "peft",
        "LoraConfig" + ("(use_dora=True)" if method is DoRA else ""),
        ours(method, stabilized),
        by_peft(method is DoRA, stabilized),
        1e-11,
        f"rank={RANK}, s={scale:.3g}{', rank-stabilized' if stabilized else ''}, AdamW",
        problem=LAYERS,
    )


CASES = tuple(case(rule, method, stable) for rule, method in (("lora", LoRA), ("dora", DoRA)) for stable in (False, True))
