"""Against the authors' repositories: low-rank pairs that are trained together, and their start from gradients."""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from poise.adapt import AltLoRA, AltLoRAPlus, LoRASB, adapters, attach, pairs

from .case import Case, Problem, Side, Trajectory, copies
from .torch_cases import in_one_dtype

RANK = 3
PAIRS = Problem(((RANK, 12), (10, RANK), (RANK, 8), (9, RANK)), steps=20)
SETTINGS: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.01}


def altlora(make: Any, **settings: Any) -> Side:
    def run(problem: Problem, options: Any) -> Trajectory:
        model = nn.Sequential(nn.Linear(12, 10), nn.Linear(8, 9)).to(problem.dtype)
        attach(model, "lora", ["0", "1"], rank=RANK)
        params = [factor for pair in pairs(model) for factor in (pair.A, pair.B)]
        with torch.no_grad():
            for p, start in zip(params, problem.start(), strict=True):
                p.copy_(start)
        opt = make(model, joint=True, scaled=False, ridge=1e-3, **SETTINGS, **settings, **options)
        return stepped(problem, opt, params)

    return run


def altlora_by_authors(name: str, **settings: Any) -> Side:
    def run(problem: Problem, module: Any) -> Trajectory:
        params = problem.start()
        names = [f"{layer}.{factor}.default.weight" for layer in (0, 1) for factor in ("lora_A", "lora_B")]
        model: Any = SimpleNamespace(
            parameters=lambda: iter(params), named_parameters=lambda: iter(zip(names, params, strict=True))
        )
        opt = getattr(module, name)(model, rank=RANK, reg=1e-3, **SETTINGS, **settings)
        return stepped(problem, opt, params)

    return in_one_dtype(run)


def stepped(problem: Problem, opt: torch.optim.Optimizer, params: Any) -> Trajectory:
    found = [copies(params)]
    for t in range(problem.steps):
        problem.set_gradients(t, params)
        opt.step()
        found.append(copies(params))
    return found


FIRST = Problem(((16, 12), (12, 16)), steps=1, dtype=torch.float32)
FIRST_LR = 1e-3


class Network(nn.Module):
    """Two layers and the mean loss of a batch, as the reference asks for it."""

    device = torch.device("cpu")

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(12, 16, bias=False), nn.Linear(16, 12, bias=False)])
        with torch.no_grad():
            for p, start in zip(self.parameters(), problem.start(), strict=True):
                p.copy_(start)

    def forward(self, input_ids: Tensor) -> Any:
        wanted = torch.sin(3 * input_ids)
        return SimpleNamespace(loss=(self.layers[1](torch.tanh(self.layers[0](input_ids))) - wanted).square().mean())


def drawn(problem: Problem) -> list[Tensor]:
    generator = torch.Generator().manual_seed(problem.seed)
    return list(torch.randn(3, 3, 12, generator=generator).to(problem.dtype))


def changes(found: list[Tensor]) -> Trajectory:
    return [copies([torch.zeros_like(t) for t in found]), copies(found)]


def first_step(problem: Problem, _: Any) -> Trajectory:
    model = Network(problem)
    losses = [lambda x=x: model(x).loss for x in drawn(problem)]
    attach(model, LoRASB(rank=RANK, first_lr=FIRST_LR), ["layers.0", "layers.1"], losses=losses)
    found: dict[str, Any] = {**adapters(model)}
    return changes([adapter.change() for adapter in found.values()])


def first_step_by_authors(released: bool) -> Side:
    """The release's sums and decompositions; unless as `released`, its decomposition made exact and not rounded."""

    def leading(M: Tensor, q: int, niter: int) -> tuple[Tensor, Tensor, Tensor]:
        U, s, Vh = torch.linalg.svd(M, full_matrices=False)
        return U[:, :q], s[:q], Vh[:q].T

    def run(problem: Problem, module: Any) -> Trajectory:
        decompositions = importlib.import_module("utils.svd_utils")
        model = Network(problem)
        accelerator = SimpleNamespace(device="cpu", num_processes=1, is_main_process=False, prepare=lambda loader: loader)
        batches = [{"input_ids": x} for x in drawn(problem)]
        loader = type("Loader", (), {"batch_size": 3, "__iter__": lambda _: iter(batches)})()
        with mock.patch.multiple(
            module,
            Accelerator=lambda: accelerator,
            OffloadContext=lambda **_: nullcontext(),
            tqdm=lambda steps, **_: steps,
        ):
            steps = module.estimate_and_process_grads_torch(model, loader, FIRST_LR, num_samples=9)
        exact = mock.patch.multiple(torch, svd_lowrank=leading, bfloat16=torch.float32)
        with nullcontext() if released else exact:
            parts = [decompositions.get_svd_grad(step.T, RANK) for step in steps.values()]
        return changes([(U.float() @ s.float() @ Vt.float()).T for U, s, Vt in parts])

    return run


CASES: tuple[Case, ...] = (
    Case(
        "altlora",
        "LucasXinYu/AltLoRA",
        "altlora",
        altlora(AltLoRA, momentum=0.9),
        altlora_by_authors("altlora", betas=(0.9, 0.999)),
        1e-11,
        "joint=True, scaled=False, ridge=1e-3, weight_decay=0.01",
        "rounding; in their state, too, float64 here",
        PAIRS,
    ),
    Case(
        "altlora-plus",
        "LucasXinYu/AltLoRA",
        "altlora_plus",
        altlora(AltLoRAPlus, betas=(0.0, 0.999), eps=1e-4),
        altlora_by_authors("altlora_plus", betas=(0.0, 0.999), eps=1e-4),
        1e-11,
        "joint=True, scaled=False, betas=(0, 0.999), ridge=1e-3, weight_decay=0.01",
        "rounding; without momentum, of which the next row is",
        PAIRS,
    ),
    Case(
        "altlora-plus",
        "LucasXinYu/AltLoRA",
        "altlora_plus",
        altlora(AltLoRAPlus, betas=(0.9, 0.999), eps=1e-4),
        altlora_by_authors("altlora_plus", betas=(0.9, 0.999), eps=1e-4),
        None,
        "the same, betas=(0.9, 0.999)",
        "theirs steps along the momentum that was carried over to the new basis, and keeps the one that was not; poise keeps "
        "the one that was",
        PAIRS,
    ),
    Case(
        "lora-sb",
        "RaghavSinghal10/lora-sb",
        "estimate_and_process_grads_torch, get_svd_grad",
        first_step,
        first_step_by_authors(released=False),
        1e-4,
        "B R A at the start, rank 3",
        "rounding; torch.svd_lowrank in theirs is exact here, and its rounding to bfloat16 left out",
        FIRST,
    ),
    Case(
        "lora-sb",
        "RaghavSinghal10/lora-sb",
        "estimate_and_process_grads_torch, get_svd_grad",
        first_step,
        first_step_by_authors(released=True),
        None,
        "as released",
        "theirs rounds A, B and R to bfloat16, after a sketch of as many columns as the rank",
        FIRST,
    ),
)
