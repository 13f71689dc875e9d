"""Against the authors' repositories and packages: rules that precondition with factors or a diagonal of curvature."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Sequence
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn

from poise.optim import MKOR, Shampoo, Shampoo4Bit, Sophia
from poise.training import LayerMeans

from . import stand_ins
from .case import MATRICES, Case, Problem, Trajectory, copies, stepping
from .torch_cases import in_one_dtype

SOPHIA = {"lr": 1e-2, "rho": 0.04, "weight_decay": 0.1}
RATE = 2.0**-7  # exact in float32
EVERY = 10  # steps between estimates of the Hessian


def estimates(problem: Problem, t: int, params: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a draw of their own, whose squares estimate the Hessian's diagonal."""
    return problem.gradients(1000 + t, params)


def sophia(problem: Problem, options: Any) -> Trajectory:
    params = problem.start()
    opt = Sophia(params, samples=480.0, **SOPHIA, **options)
    found = [copies(params)]
    for t in range(problem.steps):
        if t % EVERY == 3:  # the first steps have no estimate
            opt.feed(hessian=[h * h for h in estimates(problem, t, params)])
        problem.set_gradients(t, params)
        opt.step()
        found.append(copies(params))
    return found


def sophia_by_authors(problem: Problem, module: Any) -> Trajectory:
    params = problem.start()
    opt = module.SophiaG(params, **SOPHIA)
    found = [copies(params)]
    for t in range(problem.steps):
        if t % EVERY == 3:
            for p, h in zip(params, estimates(problem, t, params), strict=True):
                p.grad = h
            opt.update_hessian()
        problem.set_gradients(t, params)
        opt.step(bs=480)
        found.append(copies(params))
    return found


def shampoo(bound: float | None, note: str, grafting: str = "none", **settings: Any) -> Case:
    """Roots every third step, in the dtype of the weights; `settings` are poise's."""
    given = {"betas": (0.9, 1.0), "correct_bias": False, "damping": "add", "max_preconditioner_dim": 1024, **settings}

    def theirs(params: Any, module: Any) -> Any:
        types = importlib.import_module("distributed_shampoo.shampoo_types")
        grafts = {
            "adam": types.AdamPreconditionerConfig(beta2=given["betas"][1], epsilon=1e-8),
            "adagrad": types.AdaGradPreconditionerConfig(epsilon=1e-8),
        }
        in_float64 = {"factor_matrix_dtype": torch.float64, "inv_factor_matrix_dtype": torch.float64}
        return module.DistributedShampoo(
            params,
            lr=RATE,
            betas=given["betas"],
            epsilon=1e-3,
            weight_decay=0.1,
            max_preconditioner_dim=given["max_preconditioner_dim"],
            precondition_frequency=3,
            use_bias_correction=given["correct_bias"],
            grafting_config=grafts.get(grafting),
            preconditioner_config=dataclasses.replace(types.DefaultShampooConfig, **in_float64),
            distributed_config=types.SingleDeviceDistributedConfig(target_parameter_dimensionality=math.inf),
        )

    more = {"eps": 1e-3, "weight_decay": 0.1, "precondition_frequency": 3, "grafting": grafting}
    return Case(
        "shampoo",
        "facebookresearch/optimizers",
        "DistributedShampoo",
        stepping(lambda p, o: Shampoo(p, RATE, **given, **more, **o)),
        stepping(theirs),
        bound,
        ", ".join(f"{key}={value!r}" for key, value in {"eps": 1e-3, "grafting": grafting, **given}.items()),
        note,
        Problem((*MATRICES, (7,)), steps=20),
    )


def shampoo_4bit(base: Literal["sgd", "adamw"], bits: Literal[4, 32], bound: float, order: int = 1200) -> Case:
    settings = {"lr": 0.01, "weight_decay": 0.1}

    def theirs(problem: Problem, module: Any) -> Trajectory:
        cls = {"sgd": module.ShampooSGD, "adamw": module.ShampooAdamW}[base]
        every = {"stat_compute_steps": 2, "prec_compute_steps": 4, "prec_bits": bits, "prec_maxorder": order}
        with (
            mock.patch.multiple(module.F, **stand_ins.shampoo_4bit()),
            mock.patch.object(Tensor, "get_device", lambda self: self.device),
        ):
            return in_one_dtype(stepping(lambda p, m: cls(p, **settings, **every)))(problem, module)

    every = {"statistics_every": 2, "roots_every": 4, "bits": bits, "max_order": order}
    return Case(
        "shampoo-4bit",
        "Sike-Wang/low-bit-Shampoo",
        "ShampooSGD" if base == "sgd" else "ShampooAdamW",
        stepping(lambda p, o: Shampoo4Bit(p, base=base, **settings, **every, **o)),
        theirs,
        bound,
        f"base={base!r}, {bits=}, max_order={order}",
        "rounding, times the condition that shampoo_eps allows; the reference's casts to float32 are left out, and its CUDA "
        "quantizers replaced by poise's",
        Problem(((80, 64), (64, 8, 3, 3), (20,)), steps=14),
    )


def layered(problem: Problem, make: Any, extra: Any) -> Trajectory:
    """A convolution and two linear layers on drawn data; `make` gives the optimizer of a model."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(36, 7), nn.Tanh(), nn.Linear(7, 3, bias=False)
    ).to(problem.dtype)
    with torch.no_grad():
        for p, w in zip(model.parameters(), problem.start(), strict=False):
            p.copy_(w / w[0].numel() ** 0.5)
    opt = make(model, extra)
    generator = torch.Generator().manual_seed(problem.seed)
    found = [copies(list(model.parameters()))]
    for _ in range(problem.steps):
        x, y = (torch.randn(shape, generator=generator, dtype=problem.dtype) for shape in ((8, 2, 6, 6), (8, 3)))
        opt.zero_grad()
        (model(x) - y).square().sum(1).mean().backward()
        opt.step()
        found.append(copies(list(model.parameters())))
    return found


def mkor(model: nn.Module, options: Any) -> Any:
    opt = MKOR(model, 0.05, form="official", inv_freq=2, **options)
    LayerMeans(model, opt)
    return opt


def mkor_by_authors(model: Any, module: Any) -> Any:
    model.device = torch.device("cpu")
    return module.MKOR(model, half_precision=False, inv_freq=2, optimizer="sgd", lr=0.05, momentum=0.9)


def sophia_h(problem: Problem, options: Any) -> Trajectory:
    return with_estimates(problem, Sophia, lr=1e-2, betas=(0.96, 0.99), rho=1e-2, weight_decay=10.0, **options)


def sophia_h_elsewhere(problem: Problem, module: Any) -> Trajectory:
    return with_estimates(problem, module.SophiaH, lr=1.0, p=1e-2, betas=(0.96, 0.99), weight_decay=0.1)


def with_estimates(problem: Problem, make: Any, **settings: Any) -> Trajectory:
    """Signed estimates, as those of Hutchinson are, in every step."""
    params = problem.start()
    opt = make(params, **settings)
    found = [copies(params)]
    for t in range(problem.steps):
        hessian = [h + 0.3 for h in estimates(problem, t, params)]
        problem.set_gradients(t, params)
        if isinstance(opt, Sophia):
            opt.feed(hessian=hessian)
            opt.step()
        else:
            opt.step(hessian=hessian)
        found.append(copies(params))
    return found


CASES = (
    Case(
        "sophia",
        "Liuhong99/Sophia",
        "SophiaG",
        sophia,
        sophia_by_authors,
        1e-12,
        f"samples=480, an estimate every {EVERY} steps",
        "rounding; both are given squares of the same gradients. poise's own estimators count samples themselves",
    ),
    Case(
        "sophia",
        "pytorch_optimizer",
        "SophiaH",
        sophia_h,
        sophia_h_elsewhere,
        1e-12,
        "signed estimates in every step",
        "rounding; p there is lr times rho here, and its lr the ratio of both",
    ),
    shampoo(1e-11, "rounding, of a vector's root from three gradients; without merging of dimensions"),
    shampoo(1e-13, "rounding", "adagrad", betas=(0.9, 0.99), max_preconditioner_dim=5),
    shampoo(1e-5, "the reference finds bias corrections in float32", "adam", betas=(0.9, 0.99), correct_bias=True),
    shampoo(
        None,
        "the reference adds eps to every matrix before it takes eigenvalues, and then moves them up where the least is still "
        "below eps; poise's default does only the latter. At the default eps of both, 1e-12, and full rank it is all the same",
        damping="floor",
    ),
    Case(
        "shampoo",
        "pytorch_optimizer",
        "Shampoo",
        stepping(lambda p, o: Shampoo(p, 1e-2, (0.0, 1.0), 1e-4, damping="add", correct_bias=False, **o)),
        stepping(lambda p, m: m.Shampoo(p, 1e-2, matrix_eps=1e-4)),
        1e-12,
        "betas=(0.0, 1.0), eps=0.0001, damping='add', as first published",
        "rounding, times the condition of a vector's statistics",
        Problem((*MATRICES, (7,))),
    ),
    shampoo_4bit("sgd", 32, 1e-9),
    shampoo_4bit("adamw", 4, 1e-9),
    shampoo_4bit("adamw", 4, 1e-9, 70),
    Case(
        "mkor",
        "Mohammad-Mozaffari/mkor",
        "MKOR",
        lambda problem, options: layered(problem, mkor, options),
        lambda problem, module: layered(problem, mkor_by_authors, module),
        1e-4,
        "form='official', inv_freq=2, linear layers and a convolution",
        "rounding of float32, in which the reference keeps its factors",
        Problem(((4, 2, 3, 3), (4,), (7, 36), (7,), (3, 7)), steps=20, dtype=torch.float32),
    ),
)
