"""Against the authors' repositories: what is made of a network, a penalty, a diagnosis, or equal weights elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from poise.training import centroid_alignment, jacobian_penalty
from poise.training.symmetry.symmetries import mix_units

from .case import Case, Problem, Side, Trajectory, copies

GROKALIGN = Problem(((10, 6), (10,), (4, 10), (4,), (8, 6)), steps=20)


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


CASES = (
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
)
