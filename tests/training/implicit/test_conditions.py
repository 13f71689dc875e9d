"""Optimality conditions: that different ones for one problem have one root, and the same derivatives there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from poise.training.implicit.conditions import (
    block_proximal,
    gradient_step,
    kkt,
    mirror_descent,
    newton_step,
    projected_gradient,
    proximal_gradient,
    stationary,
)
from poise.training.implicit.differentiation import custom_fixed_point, custom_root, root_jvp


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


ROOT = normal(4, 4)
Q = ROOT @ ROOT.mT / 4 + torch.eye(4, dtype=torch.float64)


def f(x: Tensor, theta: Tensor) -> Tensor:
    return x @ Q @ x / 2 - theta @ x + x.pow(4).sum() / 4


def minimum(theta: Tensor) -> Tensor:
    x = torch.zeros(4, dtype=torch.float64)
    for _ in range(50):
        x = x - torch.linalg.solve(Q + torch.diag(3 * x**2), Q @ x - theta + x**3)
    return x


def identity(y: Any, *_: Any) -> Any:
    return y


SMOOTH: dict[str, tuple[Callable[..., Any], Any]] = {
    "stationary": (custom_root, stationary(f)),
    "gradient step": (custom_fixed_point, gradient_step(f, 0.2)),
    "gradient step of length 1": (custom_fixed_point, gradient_step(f)),
    "proximal gradient without a g": (custom_fixed_point, proximal_gradient(f, identity, 0.3)),
    "projected gradient into everything": (custom_fixed_point, projected_gradient(f, identity, 0.3)),
    "mirror descent": (custom_fixed_point, mirror_descent(f, lambda y, *_: torch.sinh(y), lambda x, *_: torch.asinh(x), 0.3)),
    "newton step": (custom_fixed_point, newton_step(stationary(f))),
    "half a newton step": (custom_fixed_point, newton_step(stationary(f), 0.5)),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_conditions_of_a_smooth_minimum_agree(name: str) -> None:
    wrap, condition = SMOOTH[name]
    theta = 3 * normal(4, seed=1)
    x = minimum(theta)
    found = torch.func.jacrev(wrap(condition)(lambda init, theta: minimum(theta)), argnums=1)(None, theta)
    assert (found - torch.linalg.inv(Q + torch.diag(3 * x**2))).abs().max() < 1e-10
    residual = condition(x, theta) - (0 if wrap is custom_root else x)
    assert residual.abs().max() < 1e-12


def test_blocks_agree_with_the_whole() -> None:
    """The second block is the sum of a smooth part and `|x|`, at a step length of its own."""

    def of_blocks(x: tuple[Tensor, Tensor], theta: Tensor) -> Tensor:
        return f(torch.cat([x[0], x[1]]), theta)

    def soft(y: Tensor, lr: float, *_: Any) -> Tensor:
        return y.sign() * (y.abs() - lr).relu()

    theta = 3 * normal(4, seed=2)
    x = (torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    T = block_proximal(of_blocks, (identity, soft), (0.1, 0.15))
    for _ in range(800):
        x = T(x, theta)
    one = proximal_gradient(f, lambda y, lr, *_: torch.cat([y[:2], soft(y[2:], lr)]), 0.12)
    whole = torch.cat(x)
    assert (one(whole, theta) - whole).abs().max() < 1e-12
    dt = normal(4, seed=3)
    blocks = root_jvp(lambda x, t: tuple(a - b for a, b in zip(T(x, t), x, strict=True)), x, (theta,), (dt,))
    assert (torch.cat(blocks) - root_jvp(lambda x, t: one(x, t) - x, whole, (theta,), (dt,))).abs().max() < 1e-11


def simplex(y: Tensor, *_: Any) -> Tensor:
    """The Euclidean projection onto the probability simplex."""
    ordered = y.sort(descending=True).values
    means = (ordered.cumsum(0) - 1) / torch.arange(1, len(y) + 1)
    return (y - means.gather(0, (ordered > means).sum()[None] - 1)).relu()


@pytest.mark.parametrize("corner", [False, True], ids=["inside", "on the border"])
def test_conditions_on_the_simplex_agree(corner: bool) -> None:
    theta = torch.tensor([1.2, 1.0, 0.8, -2.0 if corner else 1.1], dtype=torch.float64)
    T = projected_gradient(f, simplex, 0.2)
    x = torch.full((4,), 0.25, dtype=torch.float64)
    for _ in range(400):
        x = T(x, theta)
    assert bool((x == 0).any()) == corner
    wanted = torch.func.jacrev(custom_fixed_point(T)(lambda init, theta: x), argnums=1)(None, theta)

    slope = torch.func.grad(f)(x, theta)
    nu = -slope[x > 0].mean()
    F = kkt(f, lambda z, *_: z.sum() - 1, lambda z, *_: -z)
    point = (x, nu, (slope + nu) * (x == 0))
    assert max(float(part.abs().max()) for part in F(point, theta)) < 1e-12
    by_kkt = torch.func.jacrev(lambda t: custom_root(F, solve="lu")(lambda init, t: point)(None, t)[0])(theta)
    assert (by_kkt - wanted).abs().max() < 1e-10
    if not corner:  # the entropy's map has no value on the border
        M = mirror_descent(f, lambda y, *_: y.softmax(0), lambda z, *_: z.log(), 0.5)
        assert (M(x, theta) - x).abs().max() < 1e-12
        by_mirror = torch.func.jacrev(custom_fixed_point(M)(lambda init, theta: x), argnums=1)(None, theta)
        assert (by_mirror - wanted).abs().max() < 1e-10


def test_one_kind_of_constraint_is_enough() -> None:
    z = torch.tensor([0.2, 0.3, 0.1, 0.4], dtype=torch.float64)
    theta, nu = normal(4, seed=4), torch.tensor(0.7, dtype=torch.float64)
    slope, held, none = kkt(f, equality=lambda z, *_: z.sum() - 1)((z, nu, ()), theta)
    assert torch.allclose(slope, torch.func.grad(f)(z, theta) + 0.7) and abs(held) < 1e-12 and none == ()
    lam = torch.arange(4.0).double()
    slope, none, slack = kkt(f, inequality=lambda z, *_: z.square() - 1)((z, (), lam), theta)
    assert torch.allclose(slope, torch.func.grad(f)(z, theta) + 2 * lam * z) and none == ()
    assert torch.allclose(slack, lam * (z**2 - 1))


def test_trees_of_weights_have_conditions() -> None:
    x = {"a": torch.ones(2), "b": (torch.tensor(3.0),)}
    found = gradient_step(lambda x: (x["a"] ** 2).sum() / 2 + x["b"][0] ** 2, 0.1)(x)
    assert torch.allclose(found["a"], torch.full((2,), 0.9)) and float(found["b"][0]) == pytest.approx(2.4)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="without constraints use stationary"):
        kkt(f)
    with pytest.raises(ValueError, match="lrs: one for each of 2 blocks"):
        block_proximal(f, (identity, identity), (0.1,))
    with pytest.raises(ValueError, match="x: must have 1 blocks, got 2"):
        block_proximal(f, (identity,), (0.1,))((torch.ones(2), torch.ones(2)))
