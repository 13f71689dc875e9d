"""Optimality conditions that solutions of common problems satisfy: the F and T of implicit differentiation.

| condition             | problem                                              | for                  |
|-----------------------|------------------------------------------------------|----------------------|
| `stationary`          | min f(x)                                             | `custom_root`        |
| `kkt`                 | min f(z) where equality(z) = 0, inequality(z) <= 0   | `custom_root`        |
| `gradient_step`       | min f(x)                                             | `custom_fixed_point` |
| `proximal_gradient`   | min f(x) + g(x), g by its prox                       | `custom_fixed_point` |
| `projected_gradient`  | min f(x), x in C, C by its projection                | `custom_fixed_point` |
| `mirror_descent`      | the same in the geometry of a mirror map             | `custom_fixed_point` |
| `newton_step`         | G(x) = 0                                             | `custom_fixed_point` |
| `block_proximal`      | min f(x_1, ..., x_m) + sum g_j(x_j)                  | `custom_fixed_point` |

Every function of x that is given takes theta after it: `f(x, *theta)` gives a number, `prox(y, lr, *theta)` and
`project(y, *theta)` a tree like x. Each takes what it needs and leaves the rest: one theta for all. x may be a tree.

The solution does not depend on the step length lr, nor do derivatives there; what is solved for them is well conditioned if lr
suits f.

Source: "Efficient and Modular Implicit Differentiation" (arXiv 2105.15183).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from poise.linalg.trees import Tree, ravel, tree_map

Objective = Callable[..., Tensor]  # f(x, *theta)
Condition = Callable[..., Tree]


def stationary(f: Objective) -> Condition:
    """`F = grad_x f`: a minimum, a maximum or a saddle of f."""
    return torch.func.grad(f)


def gradient_step(f: Objective, lr: float = 1.0) -> Condition:
    """`T = x - lr grad f(x)`."""
    return lambda x, *theta: _descended(f, x, theta, lr)


def proximal_gradient(f: Objective, prox: Condition, lr: float = 1.0) -> Condition:
    """`T = prox(x - lr grad f(x), lr)` with `prox(y, lr) = argmin over z of g(z) + ||z - y||^2 / (2 lr)`."""
    return lambda x, *theta: prox(_descended(f, x, theta, lr), lr, *theta)


def projected_gradient(f: Objective, project: Condition, lr: float = 1.0) -> Condition:
    """`T = project(x - lr grad f(x))`."""
    return lambda x, *theta: project(_descended(f, x, theta, lr), *theta)


def mirror_descent(f: Objective, project: Condition, mirror: Condition, lr: float = 1.0) -> Condition:
    """`T = project(mirror(x) - lr grad f(x))`.

    Args:
        mirror: the gradient of the mirror map phi at x. For the simplex `log`.
        project: from there, the Bregman projection: `argmax over z in C of <z, y> - phi(z)`. For the simplex `softmax`.
    """

    def T(x: Tree, *theta: Tree) -> Tree:
        dual, slope = mirror(x, *theta), torch.func.grad(f)(x, *theta)
        return project(tree_map(lambda y, g: y - lr * g, dual, slope), *theta)

    return T


def kkt(f: Objective, equality: Condition | None = None, inequality: Condition | None = None) -> Condition:
    """The Karush-Kuhn-Tucker conditions of `min f(z)` where `equality(z) = 0` and `inequality(z) <= 0`.

        grad f(z) + (d equality)^T nu + (d inequality)^T lam = 0        equality(z) = 0        lam * inequality(z) = 0

    of x = (z, nu, lam); without equalities or inequalities their multipliers are `()`. Derivatives need strict complementarity:
    no inequality holds with equality and multiplier 0 at once.

    Raises:
        ValueError: neither constraint is given.
    """
    if equality is None and inequality is None:
        raise ValueError("equality=None, inequality=None: at least one is needed; without constraints use stationary(f)")

    def F(x: tuple[Tree, Tree, Tree], *theta: Tree) -> tuple[Tree, Tree, Tree]:
        z, nu, lam = x
        slope = torch.func.grad(f)(z, *theta)
        held: Tree = ()
        slack: Tree = ()
        if equality is not None:
            held, pushed = _weighted(equality, z, theta, nu)
            slope = tree_map(torch.add, slope, pushed)
        if inequality is not None:
            values, pushed = _weighted(inequality, z, theta, lam)
            slope = tree_map(torch.add, slope, pushed)
            slack = tree_map(torch.mul, lam, values)
        return slope, held, slack

    return F


def newton_step(G: Condition, lr: float = 1.0) -> Condition:
    """`T = x - lr (d1G)^-1 G(x)`, for a root of G; `newton_step(stationary(f))` for a minimum. The Jacobian is written out."""

    def T(x: Tree, *theta: Tree) -> Tree:
        vector, unravel = ravel(x)

        def flat(v: Tensor) -> Tensor:
            return ravel(G(unravel(v), *theta))[0]

        return unravel(vector - lr * torch.linalg.solve(torch.func.jacrev(flat)(vector), flat(vector)))

    return T


def block_proximal(f: Objective, proxes: Sequence[Condition], lrs: Sequence[float]) -> Condition:
    """`T_j = prox_j(x_j - lr_j grad_j f(x), lr_j)` for x a tuple of blocks, all at the same x.

    A fixed point of block coordinate descent is one of this, whatever the order of the blocks.

    Raises:
        ValueError: lrs or x have not as many entries as there are proxes.
    """
    if len(proxes) != len(lrs):
        raise ValueError(f"lrs: one for each of {len(proxes)} blocks is needed, got {len(lrs)}")

    def T(x: tuple[Tree, ...], *theta: Tree) -> tuple[Tree, ...]:
        if len(x) != len(proxes):
            raise ValueError(f"x: must have {len(proxes)} blocks, got {len(x)}")
        slopes = torch.func.grad(f)(x, *theta)
        moved = []
        for block, slope, prox, lr in zip(x, slopes, proxes, lrs, strict=True):
            moved.append(prox(tree_map(lambda a, g, lr=lr: a - lr * g, block, slope), lr, *theta))
        return tuple(moved)

    return T


def _weighted(constraint: Condition, z: Tree, theta: tuple[Tree, ...], multipliers: Tree) -> tuple[Tree, Tree]:
    """A constraint's values, and its gradients times the multipliers."""
    found = torch.func.vjp(lambda z: constraint(z, *theta), z)
    return found[0], found[1](multipliers)[0]


def _descended(f: Objective, x: Tree, theta: tuple[Tree, ...], lr: float) -> Tree:
    return tree_map(lambda a, g: a - lr * g, x, torch.func.grad(f)(x, *theta))


__all__ = [
    "block_proximal",
    "gradient_step",
    "kkt",
    "mirror_descent",
    "newton_step",
    "projected_gradient",
    "proximal_gradient",
    "stationary",
]
