"""Against the authors' repositories: what goes round a step."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from poise.linalg.kalman import descend, step_matrix
from poise.optim import SGD
from poise.training import SwitchEMA, keep_unit_rows

from .case import Absent, Case, Problem, Side, Trajectory, copies, stepping
from .package_cases import ours_sam, sam

EPOCH = 5


def switched(problem: Problem, options: Any) -> Trajectory:
    model = nn.ParameterList(problem.start())
    opt = SwitchEMA(SGD(model.parameters(), lr=0.05, **options), model, p=0.1, switch_every=EPOCH)
    found = [copies(list(model))]
    for t in range(problem.steps):
        problem.set_gradients(t, list(model))
        opt.step()
        found.append(copies(list(model)))
    return found


def switched_by_hook(problem: Problem, module: Any) -> Trajectory:
    """Their hook as their runner calls it, with epochs of a few steps; around an epoch's end it swaps weights and shadow."""
    model = nn.ParameterList(problem.start())
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    runner = SimpleNamespace(model=model, iter=0, epoch=0)
    module.is_module_wrapper = lambda _: False
    hook = module.BaseSwitchEMAHook(momentum=0.1, switch_params=True, switch_interval=1)
    hook.before_run(runner)
    hook.before_train_epoch(runner)
    found = [copies(list(model))]
    for t in range(problem.steps):
        problem.set_gradients(t, list(model))
        opt.step()
        runner.iter = t
        hook.after_train_iter(runner)
        if (t + 1) % EPOCH == 0:
            hook.after_train_epoch(runner)
            runner.epoch += 1
            hook.before_train_epoch(runner)
        found.append(copies(list(model)))
    return found


def filtered(steps: int) -> Side:
    def run(problem: Problem, _: Any) -> Trajectory:
        w, P, H, y = observed(problem)
        found = [copies([w])]
        for t in range(problem.steps):
            w = descend(w, y[t], step_matrix(P, H, steps=steps), H, steps=steps)
            found.append(copies([w]))
        return found

    return run


def filtered_by_authors(steps: int) -> Side:
    def run(problem: Problem, module: Any) -> Trajectory:
        w, P, H, y = (t.numpy() for t in observed(problem))
        found = [copies([torch.from_numpy(w)])]
        for t in range(problem.steps):
            filter_ = module.Santos(P, steps)
            filter_.initialize(w, lambda theta: H @ theta, lambda theta: H)
            w = np.asarray(filter_.forward(y[t]))
            found.append(copies([torch.from_numpy(w)]))
        return found

    return run


def observed(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    w, A, H, y = (p.detach() for p in problem.start())
    return w, A @ A.mT + torch.eye(len(A), dtype=A.dtype), H, y


def projected(problem: Problem, options: Any) -> Trajectory:
    params = problem.start()
    opt = SGD(params, lr=0.05, momentum=0.9, **options)
    keep_unit_rows(opt, params)
    found = [copies(params)]
    for t in range(problem.steps):
        problem.set_gradients(t, params)
        opt.step()
        found.append(copies(params))
    return found


def projected_by_authors(problem: Problem, module: Any) -> Trajectory:
    """Their projection, of kernels stored as (in, out), after every step of torch's SGD."""
    jax: Any = importlib.import_module("jax")
    jax.config.update("jax_enable_x64", True)
    params = problem.start()
    opt = torch.optim.SGD(params, lr=0.05, momentum=0.9)

    def project() -> None:
        for p in params:
            kernel = module.l2normalize(jax.numpy.asarray(p.detach().numpy().T), axis=0)
            p.data.copy_(torch.from_numpy(np.array(kernel)).T)

    project()
    found = [copies(params)]
    for t in range(problem.steps):
        problem.set_gradients(t, params)
        opt.step()
        project()
        found.append(copies(params))
    return found


FILTER = Problem(((6,), (6, 6), (8, 6), (20, 8)), steps=20)

CASES = (
    Case(
        "sam",
        "davda54/sam",
        "SAM",
        ours_sam,
        stepping(sam, closure=True),
        1e-13,
        "rho=0.5, over SGD with momentum",
    ),
    Case(
        "switch-ema",
        "Westlake-AI/SEMA",
        "BaseSwitchEMAHook",
        switched,
        switched_by_hook,
        1e-13,
        "p=0.1, epochs of 5 steps, over SGD",
        "rounding; switching is off in the reference until switch_params=True, switch_interval=1",
    ),
    *(
        Case(
            "implicit-map",
            "gianlucabencomo/implicitMAP",
            "Santos",
            filtered(steps),
            filtered_by_authors(steps),
            1e-10,
            f"linalg.kalman, K={steps}, noise of variance 1",
            problem=FILTER,
        )
        for steps in (1, 5)
    ),
    Case(
        "hyperspherical",
        "DAVIAN-Robotics/SimbaV2",
        "l2normalize",
        projected,
        projected_by_authors,
        1e-13,
        "keep_unit_rows, over SGD with momentum",
        "rounding; the projection only, of their jax code, which stands behind an agent of flax",
        Problem(((12, 8), (8, 12), (10, 10))),
    ),
)

NONE = "no code of the authors was found"

ABSENT = (
    Absent("usam", "none", f"{NONE}; SAM, which shares all but the length of the ascent, is compared"),
    Absent("dnsam", "none", f"{NONE}; SAM, which shares all but the length of the ascent, is compared"),
    Absent("drop-muon", "none", f"{NONE}; nothing is compared"),
    Absent("delayed", "none", f"{NONE}; nothing is compared"),
    Absent("optimal-input-gain", "none", f"{NONE}; nothing is compared"),
    Absent("mean-only-batch-norm", "openai/weightnorm", "for Lasagne, Keras and TensorFlow; nothing is compared"),
    Absent(
        "implicit-map",
        "gianlucabencomo/implicitMAP",
        "its Adam, which has one constant factor in the place of bias correction; poise drives any optimizer as it is",
    ),
    Absent("weight-conditioning", "none", f"{NONE}; nothing is compared"),
    Absent("extragradient", "none", f"{NONE}; nothing is compared"),
    Absent("local-minimax", "none", f"{NONE}; nothing is compared"),
)
