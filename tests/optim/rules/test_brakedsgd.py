"""SGD with adaptive braking (Adaptive Braking for Mitigating Gradient Delay, arXiv 2007.01397)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from conformance.problems import Grads, distance, draw, leaves, play, same
from optim.toys import numbers
from torch import Tensor, nn

from poise.optim import SGD, BrakedSGD, Optimizer, chain, clip
from poise.optim.rules.brakedsgd import braked_momentum

braked = partial(BrakedSGD, backend="eager")

CASES: list[dict[str, Any]] = [
    {},
    {"momentum": 0.5, "rho": 0.7, "weight_decay": 0.3, "eps": 1e3},
    {"per": "model", "nesterov": True},
    {"per": "filter", "rho": 0.7},
]
TYPICAL: dict[str, Any] = {"rho": 0.5}  # at 2 the velocity of one and the same gradient changes its sign, and has no pace


def reference(
    params: Sequence[Tensor],
    grads: Grads,
    *,
    lr: float | Sequence[float],
    momentum: float = 0.9,
    rho: float = 2.0,
    weight_decay: float = 0.0,
    per: str = "tensor",
    nesterov: bool = False,
    eps: float = 1e-8,
) -> list[Tensor]:
    """The angle with the velocity before; then the velocity takes in what is left of the gradient."""
    rates = list(lr) if isinstance(lr, Sequence) else [lr] * len(grads)
    x = [p.double().clone() for p in params]
    v = [torch.zeros_like(w) for w in x]
    for rate, row in zip(rates, grads, strict=True):
        present = [i for i, g in enumerate(row) if g is not None]
        g = {i: row[i].double() for i in present}  # pyright: ignore[reportOptionalMemberAccess]
        for i, a in factors(g, {i: v[i] for i in present}, rho, per, eps).items():
            v[i] = momentum * v[i] + a * g[i]
            x[i] = x[i] - rate * ((a * g[i] + momentum * v[i] if nesterov else v[i]) + weight_decay * x[i])
    return x


def factors(g: dict[int, Tensor], v: dict[int, Tensor], rho: float, per: str, eps: float) -> dict[int, Tensor]:
    """`a` for each tensor, in a shape that multiplies it."""

    def one(g: Tensor, v: Tensor) -> Tensor:
        return 1 - rho * torch.dot(g, v) / max(float(g.norm() * v.norm()), eps)

    if per == "model":
        a = one(torch.cat([t.reshape(-1) for t in g.values()]), torch.cat([t.reshape(-1) for t in v.values()]))
        return dict.fromkeys(g, a)
    if per == "tensor":
        return {i: one(g[i].reshape(-1), v[i].reshape(-1)) for i in g}
    found = {}
    for i in g:
        if g[i].ndim < 2:
            found[i] = one(g[i].reshape(-1), v[i].reshape(-1))
        else:
            rows = [one(a.reshape(-1), b.reshape(-1)) for a, b in zip(g[i], v[i], strict=True)]
            found[i] = torch.stack(rows).reshape(-1, *[1] * (g[i].ndim - 1))
    return found


@pytest.mark.parametrize("hyper", CASES, ids=["defaults", "others", "model", "filter"])
def test_sixty_steps_equal_the_formula(hyper: dict[str, Any]) -> None:
    start, grads = draw([(16, 8), (16,), (8, 4, 3, 3), ()], 60, missing=[(3, 0), (7, 1)])
    params = leaves(start)
    assert distance(play(braked(params, lr=0.01, **hyper), params, grads), reference(start, grads, lr=0.01, **hyper)) < 1e-11


@pytest.mark.parametrize("per", ["tensor", "model", "filter"])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_rho_it_is_sgd_with_momentum_bit_for_bit(per: Any, nesterov: bool, dtype: torch.dtype) -> None:
    start, grads = draw([(16, 8), (16,), (8, 4, 3, 3)], 30, dtype=dtype)
    a, b = leaves(start), leaves(start)
    found = play(braked(a, lr=0.01, rho=0.0, weight_decay=0.1, per=per, nesterov=nesterov), a, grads)
    opt = SGD(b, lr=0.01, momentum=0.9, weight_decay=0.1, nesterov=nesterov, decay="coupled", backend="eager")
    assert same(found, play(opt, b, grads))


def scaled_by(second: Sequence[Tensor], first: Sequence[Tensor], **hyper: Any) -> list[Tensor]:
    """How much of its second gradient each velocity took in, entry by entry."""
    params = leaves([torch.zeros_like(g) for g in first])
    opt = braked(params, lr=1.0, momentum=0.9, **hyper)
    before = play(opt, params, [list(first)])
    after = play(opt, params, [list(second)])
    return [(b - a - 0.9 * v) / g for a, b, v, g in zip(after, before, first, second, strict=True)]


@pytest.mark.parametrize("per", ["tensor", "model", "filter"])
@pytest.mark.parametrize("rho", [0.5, 2.0])
@pytest.mark.parametrize(
    "second, cos",
    [((30.0, 40.0), 1.0), ((-0.3, -0.4), -1.0), ((4.0, -3.0), 0.0), ((5.0, 1e-30), 0.6), ((1e-30, -7.0), -0.8)],
)
def test_a_gradient_is_scaled_by_how_it_stands_to_the_velocity(per: Any, rho: float, second: Any, cos: float) -> None:
    """Along it 1 - rho, across it 1, against it 1 + rho, whatever the lengths."""
    (a,) = scaled_by([numbers(*second)], [numbers(3.0, 4.0)], rho=rho, per=per)
    largest = numbers(*second).abs().argmax()
    assert float(a[largest]) == pytest.approx(1 - rho * cos, abs=1e-12)


def test_the_first_gradient_passes_as_it_is() -> None:
    start, grads = draw([(16, 8), (16,)], 1)
    for per in ("tensor", "model", "filter"):
        params = leaves(start)
        found = play(braked(params, lr=0.1, per=per), params, grads)
        assert distance(found, [x - 0.1 * g for x, g in zip(start, grads[0], strict=True) if g is not None]) < 1e-15


def test_the_angle_is_taken_within_each_filter_or_tensor_or_over_all() -> None:
    """The first matrix goes on in its first row and turns back in its second; the vector turns back."""
    first = [torch.eye(2, dtype=torch.float64) + 1, numbers(3.0, 4.0)]
    second = [first[0] * numbers(1.0, -1.0)[:, None], -first[1]]
    rows, vector = scaled_by(second, first, rho=0.5, per="filter")
    assert distance([rows, vector], [numbers(0.5, 1.5)[:, None].expand(2, 2), numbers(1.5, 1.5)]) < 1e-14
    matrix, vector = scaled_by(second, first, rho=0.5, per="tensor")
    assert distance([matrix, vector], [torch.ones(2, 2).double(), numbers(1.5, 1.5)]) < 1e-14
    everything = 1 + 0.5 * 25 / 35  # of squared lengths 5 + 5 and 25, the first two cancel
    matrix, vector = scaled_by(second, first, rho=0.5, per="model")
    assert distance([matrix, vector], [numbers(*[everything] * 4).view(2, 2), numbers(everything, everything)]) < 1e-14


def test_the_filters_of_a_transposed_convolution_are_its_outputs() -> None:
    """Stored (in, out, ...): it moves as the same filters of a convolution do."""
    (start,), grads = draw([(6, 4, 3, 3)], 5)
    ends = []
    for flip in (False, True):
        layer = nn.ConvTranspose2d(4, 6, 3, bias=False) if flip else nn.Conv2d(4, 6, 3, bias=False)
        model, weight = nn.Sequential(nn.Conv2d(4, 4, 1), layer).double(), layer.weight
        weight.data.copy_(start.transpose(0, 1) if flip else start)
        opt = braked(model, lr=0.01, per="filter")
        play(opt, [weight], [[g.transpose(0, 1).contiguous() if flip else g for g in row if g is not None] for row in grads])
        ends.append(weight.detach().transpose(0, 1) if flip else weight.detach())
    assert distance(ends[:1], ends[1:]) < 1e-14


def test_zero_gradients_take_the_velocity_on() -> None:
    start, grads = draw([(16, 8)], 1)
    for per in ("tensor", "model", "filter"):
        params = leaves(start)
        found = play(braked(params, lr=0.1, per=per), params, [*grads, [torch.zeros(16, 8, dtype=torch.float64)]])
        assert grads[0][0] is not None
        assert distance(found, [start[0] - 0.1 * 1.9 * grads[0][0]]) < 1e-14


def test_it_takes_the_place_of_momentum_in_a_chain() -> None:
    """After a clip it sees what the clip lets through."""
    start, grads = draw([(16, 8), (16,)], 6)
    params = leaves(start)
    opt = Optimizer(params, chain(clip(0.1), braked_momentum(0.9, 0.5)), lr=0.1, backend="eager")
    cut: Grads = []
    for row in grads:
        norm = math.sqrt(sum(float(g.square().sum()) for g in row if g is not None))
        cut.append([g * 0.1 / (norm + 1e-6) for g in row if g is not None])
    assert distance(play(opt, params, grads), reference(start, cut, lr=0.1, rho=0.5)) < 1e-13


def delayed(make: Callable[..., torch.optim.Optimizer], steps: int, *rates: float) -> list[float]:
    """A quadratic with eigenvalues 0.01 to 1, on gradients of 8 steps ago, at each rate: its loss over that at the start."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(20, 20, generator=generator, dtype=torch.float64)).Q
    H = basis * torch.logspace(-2, 0, 20, dtype=torch.float64) @ basis.T
    start = torch.randn(20, generator=generator, dtype=torch.float64)
    params = leaves([start for _ in rates])
    groups = [{"params": [p], "lr": rate} for p, rate in zip(params, rates, strict=True)]
    opt = make(groups, momentum=0.9, backend="eager")
    seen = deque([[start for _ in rates]] * 9, maxlen=9)
    for _ in range(steps):
        for p, w in zip(params, seen[0], strict=True):
            p.grad = H @ w
        opt.step()
        seen.append([p.detach().clone() for p in params])
    return [float(w @ H @ w) / float(start @ H @ start) for w in seen[-1]]


def test_on_gradients_of_eight_steps_ago_momentum_diverges_where_braking_converges() -> None:
    slow, fast = delayed(SGD, 600, 0.01, 0.02)
    assert slow < 1e-2 and fast > 1e3  # it is the rate, not the problem
    assert max(delayed(BrakedSGD, 1000, 0.05, 0.1)) < 1e-2


@pytest.mark.parametrize(
    "name, value", [("lr", -0.1), ("momentum", 1.0), ("rho", -0.1), ("weight_decay", -0.1), ("per", "row"), ("eps", -1.0)]
)
def test_an_impossible_setting_is_refused_by_name(name: str, value: Any) -> None:
    hyper: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=name):
        braked(leaves(draw([(4, 4)], 0)[0]), **hyper)
