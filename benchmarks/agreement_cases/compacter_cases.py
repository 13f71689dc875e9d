"""Against the authors' repository: two bottleneck adapters after linear layers, that share the matrices A and are trained."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poise.adapt import Compacter, adapters, attach

from .case import Case, Problem, Trajectory, copies

WIDTH, N = 24, 4
RANK = 2


class Net(nn.Module):
    def __init__(self, problem: Problem) -> None:
        super().__init__()
        first, second = problem.start()
        self.first, self.second = (nn.Linear(WIDTH, WIDTH, bias=False, dtype=problem.dtype) for _ in range(2))
        self.after: Any = (nn.Identity(), nn.Identity())
        with torch.no_grad():
            self.first.weight.copy_(0.2 * first)
            self.second.weight.copy_(0.2 * second)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.after[0](self.first(x)))
        return self.after[1](self.second(h))


def adapted(problem: Problem) -> tuple[Net, list[Any]]:
    """poise's, with all that trains in the authors' order of a map: A, s, t, b."""
    net = Net(problem)
    attach(net, Compacter(n=N, reduction=3, rank=RANK, spread=0.3, norms=False), nn.Linear, seed=0)
    return net, [part for one in adapters(net).values() for part in (one.down, one.up)]


def ours(problem: Problem, _: Any) -> Trajectory:
    net, maps = adapted(problem)
    return trained(problem, net, [maps[0].mixing.A, *(p for one in maps for p in (one.s, one.t, one.b))])


def by_authors(problem: Problem, module: Any) -> Trajectory:
    net = Net(problem)
    _, start = adapted(problem)
    rule = nn.Parameter(start[0].mixing.A.detach().clone())
    maps = []
    for one in start:
        inputs, outputs = one.s.shape[1] * N, len(one.b)
        settings = {
            "w_init": "glorot-uniform",
            "c_init": "normal",
            "shared_phm_rule": True,
            "factorized_phm": True,
            "phm_rank": RANK,
        }
        layer = module.PHMLinear(inputs, outputs, N, **settings).to(problem.dtype)
        layer.set_phm_rule(rule)
        with torch.no_grad():
            layer.W_left.copy_(one.s)
            layer.W_right.copy_(one.t)
        maps.append(layer)

    def after(down: Any, up: Any) -> Any:
        return lambda x: x + up(F.gelu(down(x), approximate="tanh"))

    net.after = (after(*maps[:2]), after(*maps[2:]))
    return trained(problem, net, [rule, *(p for one in maps for p in (one.W_left, one.W_right, one.b))])


def trained(problem: Problem, net: Net, params: list[Any]) -> Trajectory:
    generator = torch.Generator().manual_seed(problem.seed)
    opt = torch.optim.AdamW(params, lr=3e-3)
    found = [copies(params)]
    for _ in range(problem.steps):
        x = torch.randn(16, WIDTH, generator=generator, dtype=problem.dtype)
        opt.zero_grad()
        (net(x) - x.roll(1, -1) * x).square().mean().backward()
        opt.step()
        found.append(copies(params))
    return found


CASES = (
    Case(
        "compacter",
        "rabeehk/compacter",
        "PHMLinear",
        ours,
        by_authors,
        1e-13,
        f"n={N}, rank={RANK}, two adapters, AdamW",
        "rounding; the reference makes the whole matrix, poise does not",
        Problem(((WIDTH, WIDTH), (WIDTH, WIDTH)), steps=40),
    ),
)
