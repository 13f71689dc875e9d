"""Against the authors' repositories: what goes round a step, and what is added to a loss."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from poise.linalg.kalman import descend, step_matrix
from poise.optim import SGD
from poise.training import SwitchEMA, centroid_alignment, jacobian_penalty, keep_unit_rows
from poise.training.symmetry.symmetries import mix_units

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
    """Their hook by iterations: by epochs it switches in the second epoch at the earliest, as `iter > start` is strict here."""
    model = nn.ParameterList(problem.start())
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    runner = SimpleNamespace(model=model, iter=0, epoch=0)
    module.is_module_wrapper = lambda _: False
    hook = module.BaseSwitchEMAHook(momentum=0.1, switch_params=True, switch_by_iter=True, switch_interval=EPOCH)
    hook.before_run(runner)
    found = [copies(list(model))]
    for t in range(problem.steps):
        problem.set_gradients(t, list(model))
        opt.step()
        runner.iter = t
        hook.after_train_iter(runner)
        found.append(copies(list(model)))
    return found


def network(problem: Problem) -> tuple[nn.Sequential, Tensor]:
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)).to(problem.dtype)
    drawn = problem.start()
    with torch.no_grad():
        for p, w in zip(model.parameters(), drawn, strict=False):
            p.copy_(0.5 * w)
    return model, drawn[-1].detach()


def penalized(penalty: Any) -> Side:
    """Plain descent on the penalty alone; both draw the directions from torch's generator, in the same order."""

    def run(problem: Problem, extra: Any) -> Trajectory:
        before = torch.get_default_dtype()
        torch.set_default_dtype(problem.dtype)
        try:
            model, x = network(problem)
            found = [copies(list(model.parameters()))]
            for t in range(problem.steps):
                torch.manual_seed(t)
                model.zero_grad()
                penalty(model, x.clone(), extra).backward()
                with torch.no_grad():
                    for p in model.parameters():
                        if p.grad is not None:
                            p -= 0.05 * p.grad
                found.append(copies(list(model.parameters())))
        finally:
            torch.set_default_dtype(before)
        return found

    return run


def ours_penalty(model: nn.Module, x: Tensor, _: Any) -> Tensor:
    x.requires_grad_()
    return jacobian_penalty(model(x), x, strength=1.0, projections=2)


def aligned(problem: Problem, _: Any) -> Trajectory:
    model, x = network(problem)
    x.requires_grad_()
    return [[torch.zeros(len(x), dtype=torch.float64)], copies([centroid_alignment(model(x), x)])]


def aligned_by_authors(problem: Problem, module: Any) -> Trajectory:
    model, x = network(problem)
    found = module.Centroids(model)(x).get_alignments()
    return [[torch.zeros(len(x), dtype=torch.float64)], copies([found])]


def teleported(act: Any) -> Side:
    """Weights moved again and again by small T: `V, U -> (1 + T) V, U s(V X) s((1 + T) V X)^+`, 8 units, 30 inputs."""

    def run(problem: Problem, module: Any) -> Trajectory:
        V, U, X = (p.detach() for p in problem.start())
        found = [copies([V, U])]
        for t in range(problem.steps):
            T = 0.01 * problem.gradients(t, [V, U, X])[0][:, :8]
            V, U = act(V, U, X, T, module)
            found.append(copies([V, U]))
        return found

    return run


def slope(z: Tensor) -> Tensor:
    return nn.functional.leaky_relu(z, 0.1)


def mixed(V: Tensor, U: Tensor, X: Tensor, T: Tensor, _: Any) -> tuple[Tensor, Tensor]:
    V, _b, U = mix_units(V, None, U, X.mT, torch.eye(8, dtype=T.dtype) + T, slope, project=True)
    return V, U


def mixed_by_authors(V: Tensor, U: Tensor, X: Tensor, T: Tensor, module: Any) -> tuple[Tensor, Tensor]:
    U, V = module.group_action(U, V, X, None, T, slope)
    return V, U


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
    import jax  # pyright: ignore[reportMissingImports]

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


GROKALIGN = Problem(((10, 6), (10,), (4, 10), (4,), (8, 6)), steps=20)
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
        "p=0.1, a switch every 5 steps, over SGD",
        "rounding; by iterations. By epochs the hook begins one epoch later, as its comparison with switch_start is strict",
    ),
    Case(
        "grokalign",
        "ThomasWalker1/grokalign",
        "GrokAlign",
        penalized(ours_penalty),
        penalized(lambda model, x, m: m.GrokAlign(model, 2)(x)),
        1e-12,
        "descent on the penalty alone, 2 projections",
        problem=GROKALIGN,
    ),
    Case(
        "grokalign",
        "ThomasWalker1/grokalign",
        "Centroids",
        aligned,
        aligned_by_authors,
        1e-13,
        "centroid_alignment",
        problem=GROKALIGN,
    ),
    Case(
        "teleport",
        "Rose-STL-Lab/Teleportation-Optimization",
        "group_action",
        teleported(mixed),
        teleported(mixed_by_authors),
        1e-11,
        "group='data', project=True; 8 units, 30 inputs",
        "rounding, times the condition of the pseudo-inverse. Only the action: the authors' loop over layers keeps activations "
        "of before the lower layers moved, which moves the loss, and is not followed",
        Problem(((8, 12), (4, 8), (12, 30)), steps=20),
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
    Absent("mean-only-batch-norm", "openai/weightnorm", "Theano and TensorFlow of 2016; nothing is compared"),
    Absent(
        "implicit-map",
        "gianlucabencomo/implicitMAP",
        "its Adam, which has one constant factor in the place of bias correction: poise drives any optimizer, and theirs is none "
        "of poise's",
    ),
    Absent("weight-conditioning", "none", f"{NONE}; nothing is compared"),
)
