"""Against the authors' repositories: layers that keep little, and blocks of layers that are trained in turn."""

from __future__ import annotations

import importlib
from typing import Any
from unittest import mock

import torch
from torch import nn

from poise.optim import AdamW, Optimizer, adam, chain, debias
from poise.training import BAdam, CompAct

from .case import Case, Problem, Trajectory, copies
from .torch_cases import in_one_dtype


def network(problem: Problem) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)).to(problem.dtype)
    with torch.no_grad():
        for p, w in zip(model.parameters(), problem.start(), strict=True):
            p.copy_(0.5 * w)
    return model


def trained(problem: Problem, model: nn.Module, opt: Any, weights: Any, after: Any = None) -> Trajectory:
    """Steps on drawn batches; `weights` gives what is compared."""
    generator = torch.Generator().manual_seed(problem.seed)
    found = [copies(weights())]
    for _ in range(problem.steps):
        x = torch.randn(16, 6, generator=generator, dtype=problem.dtype)
        opt.zero_grad()
        (model(x) - x[:, :4] * x[:, 2:]).square().mean().backward()
        opt.step()
        if after is not None:
            after()
        found.append(copies(weights()))
    return found


GAP = 4
SEEDS = (17, 23)  # of the layers' projections


def compact(problem: Problem, options: Any) -> Trajectory:
    model: Any = CompAct.attach(network(problem), "*", rank=0.5, gap=GAP, scale=0.25)
    layers = [model[0], model[2]]
    for layer, seed in zip(layers, SEEDS, strict=True):
        layer.sketch.seed = seed
    rule = chain(adam((0.9, 0.999), 1e-6, correct_bias=False), debias((0.9, 0.999)))
    opt = Optimizer(model, rule, 0.01, 0.3, decay="after", **options)
    CompAct.follow(opt, model)
    return trained(problem, model, opt, lambda: [t for layer in layers for t in (layer.weight, layer.bias)])


def compact_by_authors(problem: Problem, module: Any) -> Trajectory:
    random = importlib.import_module("random_utils.random_sampling")
    optimizers = importlib.import_module("optimizers.adamw")
    model: Any = network(problem)
    random.Manager().init_iter()
    for i, seed in zip((0, 2), SEEDS, strict=True):
        model[i] = module.SmallLinear.like(model[i])
        projector = random.Projector(rank=0.5, proj_type="gaussian", scale=0.25, gap=GAP, full_matrices=False)
        projector.seed = seed - 1  # it moves on before the first step, too
        model[i].weight.projector = projector
    opt = optimizers.AdamW(model.parameters(), lr=0.01, weight_decay=0.3, no_deprecation_warning=True)
    return trained(problem, model, opt, lambda: list(model.parameters()), random.Manager().update_iter)


def badam(problem: Problem, options: Any) -> Trajectory:
    model = network(problem)
    opt = BAdam(AdamW(model, lr=0.01, weight_decay=0.1, **options), model, switch_every=5, order="ascending")
    return trained(problem, model, opt, lambda: list(model.parameters()))


def badam_by_authors(problem: Problem, module: Any) -> Trajectory:
    model = network(problem)
    inner = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    prefixes, named = [["0."], ["2."]], list(model.named_parameters())
    with mock.patch.multiple(module, is_deepspeed_zero3_enabled=lambda: False, ALL_LAYERNORM_LAYERS=[]):
        opt = module.BlockOptimizer(inner, named, prefixes, switch_block_every=5, switch_mode="ascending", verbose=0)
        opt.global_step = -1  # so that the first block, too, has all its steps
        return trained(problem, model, opt, lambda: list(model.parameters()))


LAYERS = Problem(((10, 6), (10,), (4, 10), (4,)), steps=20)

CASES = (
    Case(
        "compact",
        "NitzanHod/compact",
        "SmallLinear",
        compact,
        compact_by_authors,
        1e-13,
        f"rank=0.5, gap={GAP}, two layers and the authors' AdamW",
        "rounding; both draw projections from torch's generator, from the same seeds",
        LAYERS,
    ),
    Case(
        "badam",
        "Ledzy/BAdam",
        "BlockOptimizer",
        badam,
        in_one_dtype(badam_by_authors),
        1e-13,
        "order='ascending', switch_every=5, around AdamW",
        "rounding; the reference's count begins one step later here: as released, it gives the first block one step less. Its "
        "copies in float32 are left in the dtype of the weights",
        LAYERS,
    ),
)
