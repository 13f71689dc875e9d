"""Against the authors' repositories: rules of a window of gradients, whose CUDA kernels plain loops replace."""

from __future__ import annotations

import functools
import importlib
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from poise.optim import EFCP, MFAC, MicroAdam
from poise.optim.transforms import compressed_rows
from poise.training import MFACPruner

from . import stand_ins
from .case import Case, Problem, Trajectory, copies, stepping
from .torch_cases import in_one_dtype

ON_CPU = "its CUDA kernels replaced by plain loops"
WINDOW = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.5}


def mfac_by_authors(problem: Problem, module: Any) -> Trajectory:
    with stand_ins.mfac():
        make = stepping(lambda p, m: m.MFAC(p, ngrads=8, damp=1e-2, optdev=torch.device("cpu"), **WINDOW))
        return in_one_dtype(make)(problem, module)


def pruned(problem: Problem, prune: Any) -> Trajectory:
    """Rounds on a small network, each on losses of drawn samples; `prune(model, samples, sparsity)` makes one."""
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)).to(problem.dtype)
    with torch.no_grad():
        for p, w in zip(model.parameters(), problem.start(), strict=True):
            p.copy_(0.5 * w)
    generator = torch.Generator().manual_seed(problem.seed)
    found = [copies(list(model.parameters()))]
    for t in range(problem.steps):
        samples = [
            tuple(torch.randn(3, n, generator=generator, dtype=problem.dtype) for n in (6, 4)) for _ in range(SAMPLES - 1)
        ]
        prune(model, samples, (15 * (t + 1) + 0.25) / 100)  # of the 60 + 40 weights
        found.append(copies(list(model.parameters())))
    return found


SAMPLES = 12


def pruner(block: int | None) -> Case:
    def ours(problem: Problem, _: Any) -> Trajectory:
        made: list[MFACPruner] = []

        def prune(model: nn.Module, samples: Any, sparsity: float) -> None:
            made[:] = made or [MFACPruner(model, 1e-2, block)]
            losses = [nn.functional.mse_loss(model(x), y) for x, y in samples]
            made[0].prune(lambda: [*losses, 0 * model(samples[0][0]).sum()], sparsity, rounds=1)

        return pruned(problem, prune)

    def theirs(problem: Problem, _: Any) -> Trajectory:
        module = importlib.import_module("main_prun")
        cpu, names = torch.device("cpu"), ["0.weight", "2.weight"]
        kept = [torch.ones(100, dtype=torch.bool)]
        swap = functools.partial(module.HInvFastSwap, gpu=cpu)

        def prune(model: nn.Module, samples: Any, sparsity: float) -> None:
            blocks = (-1 if block is None else block, 2)
            one = module.MFACPruner(model, names, samples, nn.functional.mse_loss, SAMPLES, *blocks, 1e-2, 1)
            with mock.patch.object(module, "HInvFastSwap", swap):
                kept[0], w = one.prune(kept[0], sparsity)
            module.set_pvec(w, model, names)

        return pruned(problem, prune)

    return Case(
        "m-fac-pruner",
        "IST-DASLab/M-FAC",
        "MFACPruner",
        ours,
        in_one_dtype(theirs),
        1e-13,
        f"block={block}, 4 rounds of 15 weights",
        f"rounding; the reference leaves the last of its {SAMPLES} gradients at zero, and poise is given one that is",
        Problem(((10, 6), (10,), (4, 10), (4,)), steps=4),
    )


def efcp(reference: str, bound: float, settings: str, note: str, ours: Any, theirs: Any, problem: Problem) -> Case:
    def run(problem: Problem, module: Any) -> Trajectory:
        found = [module] + [importlib.import_module(f"optimizers.{name}") for name in PARTS]
        with stand_ins.mfac(*found):
            return in_one_dtype(stepping(lambda p, _: theirs(p, *found)))(problem, module)

    return Case("efcp", "IST-DASLab/EFCP", reference, ours, run, bound, settings, f"{note}; {ON_CPU}", problem)


PARTS = ("sparse.SparseHinvSequential", "lowrank.low_rank_optim", "dense.GGT")


def sparse_by_authors(params: Any, module: Any, *_: Any) -> Any:
    return module.SparseGradientMFAC(
        params,
        ngrads=8,
        k_init=0.25,
        lr=0.005,
        damp=1e-2,
        wd_type="wd",
        weight_decay=1e-3,
        momentum=0.5,
        dev="cpu",
        gpus=["cpu"],
    )


def low_rank(problem: Problem, options: Any) -> Trajectory:
    def first(_: Tensor, like: Tensor) -> Tensor:
        return torch.ones_like(like).tril()

    with mock.patch.object(compressed_rows, "_normal", first):
        settings = {"window": 8, "damping": 1e-2, "compressor": "lowrank", "rank": 2, "decay": "l2"}
        return stepping(lambda p, o: EFCP(p, 0.01, weight_decay=0.1, **settings, **o))(problem, options)


def low_rank_by_authors(params: Any, _module: Any, _sparse: Any, module: Any, *_: Any) -> Any:
    cpu = torch.device("cpu")
    opt = module.LowRankAggregateMFAC(params, 0.01, 0.0, 0.1, num_grads=8, damp=1e-2, rank=2, moddev=cpu, optdev=cpu)
    for one in opt.compressors[0]:
        if len(one.grad_shape) > 1:
            one.q_memory.fill_(1).tril_()
    return opt


def ggt_by_authors(params: Any, _module: Any, _sparse: Any, _low: Any, module: Any) -> Any:
    with mock.patch.object(module, "get_first_device", stand_ins.first_device):
        return module.GGT(params, lr=0.01, wd=0.1, r=8, beta1=0.0, beta2=1.0, eps=1.0)


MICRO = {"lr": 0.01, "weight_decay": 0.1}
BLOCK = 40  # elements; the last block of most tensors is shorter


def micro_by_authors(problem: Problem, module: Any) -> Trajectory:
    with mock.patch.multiple(module, **stand_ins.micro_adam(BLOCK)):
        return stepping(lambda p, m: m.MicroAdam(p, m=4, quant_block_size=16, k_init=0.1, **MICRO))(problem, module)


SINGLE = Problem(((12, 8),), dtype=torch.float32)

CASES = (
    Case(
        "m-fac",
        "IST-DASLab/M-FAC",
        "MFAC",
        stepping(lambda p, o: MFAC(p, window=8, damping=1e-2, **WINDOW, **o)),
        mfac_by_authors,
        1e-10,
        "window=8, damping=0.01, momentum, decay",
        f"rounding: the reference takes differences of nearly equal vectors; {ON_CPU}",
    ),
    pruner(None),
    pruner(16),
    efcp(
        "SparseGradientMFAC",
        3e-4,
        "density=0.25, momentum, float32 values",
        "rounding of float32. One tensor, which is one block: the reference takes the largest entries of the whole model. Its "
        "momentum is a sum, and its decay not scaled by lr",
        stepping(lambda p, o: EFCP(p, 0.01, 0.5, 0.1, window=8, damping=1e-2, density=0.25, value_dtype=torch.float32, **o)),
        sparse_by_authors,
        SINGLE,
    ),
    efcp(
        "LowRankAggregateMFAC",
        1e-6,
        "compressor='lowrank', rank=2, decay='l2'",
        "the reference adds 1e-8 to norms; the first Q is given, which there comes from the weights. No momentum: with it the "
        "reference fails on all but matrices",
        low_rank,
        low_rank_by_authors,
        Problem(((12, 8), (8, 12), (7,), (6, 4, 3, 3)), steps=12),
    ),
    efcp(
        "GGT",
        3e-4,
        "preconditioner='ggt', density=1, window=8, damping=1, decay='l2'",
        "rounding of float32, in eigenvectors; no compression, since the releases with it do not run",
        stepping(
            lambda p, o: EFCP(
                p,
                0.01,
                0.0,
                0.1,
                window=8,
                damping=1.0,
                preconditioner="ggt",
                density=1.0,
                value_dtype=torch.float32,
                decay="l2",
                **o,
            )
        ),
        ggt_by_authors,
        SINGLE,
    ),
    Case(
        "micro-adam",
        "IST-DASLab/ISTA-DASLab-Optimizers",
        "MicroAdam",
        stepping(lambda p, o: MicroAdam(p, window=4, density=0.1, block=BLOCK, quant_block=16, **MICRO, **o)),
        micro_by_authors,
        1e-13,
        f"window=4, density=0.1, block={BLOCK}, quant_block=16",
        f"rounding; {ON_CPU}, its 4-bit codes by poise's, which round the ends of their levels outwards",
    ),
)
