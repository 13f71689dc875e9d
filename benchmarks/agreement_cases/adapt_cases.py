"""Against the authors' repositories: adapters. A layer's adapter is trained on drawn batches; its parameters are compared."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from poise.adapt import adapters, attach
from poise.adapt.methods.goat import GOAT

from .case import Case, Problem, Trajectory, copies

EXPERTS, RANK, TOP_K, BALANCE = 4, 8, 2, 0.1
INPUTS = 16


def linear(problem: Problem) -> nn.Linear:
    weight, bias = problem.start()
    made = nn.Linear(INPUTS, len(weight), dtype=problem.dtype)
    made.load_state_dict({"weight": weight.detach() / 4, "bias": bias.detach()})
    return made.requires_grad_(False)


def gate(problem: Problem) -> Tensor:
    return problem._draw(100)[0][:EXPERTS].clone()


def trained(problem: Problem, layer: Any, params: Any, extra: Any) -> Trajectory:
    """Steps of AdamW; `params` gives what is compared, with the layer's outputs on a batch of its own."""
    generator = torch.Generator().manual_seed(problem.seed)
    opt = torch.optim.AdamW(params(), lr=0.01)
    probe = torch.randn(3, 5, INPUTS, generator=generator, dtype=problem.dtype)

    def seen() -> list[Tensor]:
        with torch.no_grad():
            return copies([*params(), layer(probe)])

    found = [seen()]
    for _ in range(problem.steps):
        x = torch.randn(6, 7, INPUTS, generator=generator, dtype=problem.dtype)
        opt.zero_grad()
        ((layer(x) - x[..., : INPUTS - 4] * x[..., 4:]).square().mean() + extra()).backward()
        opt.step()
        found.append(seen())
    return found


def goat(**settings: Any) -> Any:
    def run(problem: Problem, _: Any) -> Trajectory:
        layer = linear(problem)
        method = GOAT(rank=RANK, experts=EXPERTS, top_k=TOP_K, dropout=0.0, balance=BALANCE, **settings)
        attach(layer, method, targets=nn.Linear, seed=0)
        one: Any = adapters(layer)[""]
        one.gate.data.copy_(gate(problem))
        return trained(problem, layer, lambda: [one.lora_A, one.lora_B, one.gate], float)

    return run


def goat_by_authors(scaling: str | None = None) -> Any:
    def run(problem: Problem, module: Any) -> Trajectory:
        told = {"lora_rank": RANK, "lora_alpha": 2 * RANK, "num_experts": EXPERTS, "top_k": TOP_K, "init_type": "goat"}
        with mock.patch.dict(os.environ, {"SCALING": scaling} if scaling else {}):
            layer = module.LinearGOATLayer(linear(problem), "default", init_cof=1 / EXPERTS, **told)
        layer.lora_gating["default"].weight.data.copy_(gate(problem))
        downs, ups, mixture = layer.lora_A["default"], layer.lora_B["default"], layer.moe_layer["default"]
        factors = [expert.weight for expert in (*downs, *ups)]
        choice = layer.lora_gating["default"].weight
        layer.requires_grad_(False)
        for p in (*factors, choice):
            p.requires_grad_(True)
        steps = trained(problem, layer, lambda: [*factors, choice], lambda: BALANCE * mixture.layer_loss)
        return [[torch.cat(at[:EXPERTS]), torch.cat(at[EXPERTS:-2], 1), *at[-2:]] for at in steps]

    return run


def goat_case(settings: str, ours: dict[str, Any], scaling: str | None = None) -> Case:
    return Case(
        "goat",
        "Facico/GOAT-PEFT",
        "LinearGOATLayer",
        goat(**ours),
        goat_by_authors(scaling),
        1e-5,
        settings,
        "rounding; their shift is written into the weight, and by default E times this one, which is asked of them here. The "
        "scale of the theory is given them as a number: as released, it cannot be had together with the segments",
        Problem(((INPUTS - 4, INPUTS), (INPUTS - 4,)), steps=40, dtype=torch.float32),
    )


CASES = (
    goat_case('scale="alpha"', {"scale": "alpha"}),
    goat_case('scale="theory"', {}, str((3 * INPUTS / (RANK // EXPERTS)) ** 0.5)),
)
