"""ECO (ECO: Quantized Training without Full-Precision Master Weights, arXiv 2601.22101)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conformance.problems import Grads, distance, draw, leaves, play, same
from torch import Tensor, nn

from poise.memory.grid import Grid
from poise.optim import ECO, SGD, AdamW

NEAREST = Grid(stochastic=False)
CASES: list[dict[str, Any]] = [
    {"weights": NEAREST, "weight_decay": 0.3},
    {"weights": NEAREST, "base": "sgdm", "two_errors": True, "decay_in_injection": False},
]
TYPICAL: dict[str, Any] = {"weights": "auto"}  # all other behaviours are those of weights that are not on a grid


def on_grid(w: Tensor) -> Tensor:
    """Each row to the nearest of 255 values."""
    if w.ndim < 2:
        return w
    rows = w.reshape(len(w), -1)
    scale = rows.abs().amax(1, keepdim=True) / 127
    return torch.where(scale > 0, torch.round(rows / scale) * scale, rows).reshape(w.shape)


def reference(
    params: Sequence[Tensor],
    grads: Grads,
    *,
    lr: float | Sequence[float],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    base: str = "adam",
    momentum: float = 0.9,
    two_errors: bool = False,
    decay_in_injection: bool = True,
    weights: Any = NEAREST,
) -> list[Tensor]:
    """Step, round, and hand the momentum what rounding kept."""
    rates = list(lr) if isinstance(lr, Sequence) else [lr] * len(grads)
    b1, b2 = (momentum, 0.0) if base == "sgdm" else betas
    found = []
    for i, p in enumerate(params):
        w, t = p.double().clone(), 0
        m, v, before = torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w)
        for rate, row in zip(rates, grads, strict=True):
            g = row[i]
            if g is None:
                continue
            t += 1
            m = b1 * m + (1 - b1) * g.double()
            v = b2 * v + (1 - b2) * g.double() ** 2
            a = torch.full_like(w, rate)
            if base == "adam":
                a = rate / ((1 - b1**t) * ((v / (1 - b2**t)).sqrt() + eps))
            wanted = (1 - rate * weight_decay) * w - a * m
            w = wanted if weights == "auto" else on_grid(wanted)
            error = wanted - w
            shrink = 1 - rate * weight_decay if decay_in_injection else 1.0
            if w.ndim > 1:
                m = m + shrink * ((before if two_errors else error) - error / b1) / a
            before = error
        found.append(w)
    return found


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_with_two_errors_sgd_follows_a_master_copy(weight_decay: float) -> None:
    """The weights of a float32 master that is rounded for every forward pass, over 300 steps; with decay too."""
    start, grads = draw([(8, 16)], 300)
    params = leaves([on_grid(start[0])])
    opt = ECO(params, 0.05, base="sgdm", weight_decay=weight_decay, two_errors=True, weights=NEAREST, backend="eager")
    master, m = on_grid(start[0]), torch.zeros_like(start[0])
    worst = 0.0
    for row in grads:
        g = row[0]
        assert g is not None
        play(opt, params, [row])
        m = 0.9 * m + 0.1 * g
        master = (1 - 0.05 * weight_decay) * master - 0.05 * m
        worst = max(worst, distance([params[0]], [on_grid(master)]))
    assert worst < 1e-11


@pytest.mark.parametrize("lr", [2e-2, 1e-1])
def test_a_quadratic_is_solved_below_the_grid_where_rounding_alone_stalls(lr: float) -> None:
    """Grid of spacing 0.05, to nearest: without feedback the loss stands the higher, the lower lr is."""
    h = torch.linspace(0.5, 2.0, 64, dtype=torch.float64).view(1, -1)
    grid = Grid(scale=0.05, stochastic=False)
    ends = {}
    for name in ("eco", "naive"):
        p = nn.Parameter(torch.ones(1, 64, dtype=torch.float64))
        feedback = {"weights": grid} if name == "eco" else {"weights": grid, "min_lr": 1.0}
        opt = ECO([p], lr, base="sgdm", weight_decay=0.0, backend="eager", **feedback)  # type: ignore[arg-type]
        tail = []
        for step in range(int(20 / lr)):
            p.grad = h * p.detach()
            opt.step()
            if step >= int(18 / lr):
                tail.append(float((h * p.detach() ** 2).sum() / 2))
        ends[name] = sum(tail) / len(tail)
    # a grid of 0.05 costs its variance: sum h 0.05^2 / 12 / 2 is 0.008
    assert ends["eco"] < 0.02
    assert ends["naive"] > 0.3


@pytest.mark.parametrize("base", ["adam", "sgdm"])
def test_without_a_grid_it_is_its_base(base: Any) -> None:
    start, grads = draw([(8, 16), (5,)], 12)
    params, twins = leaves(start), leaves(start)
    opt = ECO(params, 0.01, base=base, weight_decay=0.1, weights="auto", momentum=0.9)
    twin: Any = AdamW(twins, 0.01, weight_decay=0.1)
    if base == "sgdm":  # an average is SGD's sum times 1 - momentum
        twin = SGD(twins, 0.01, momentum=0.9, dampening=0.0, weight_decay=0.0, nesterov=False)
        opt = ECO(params, 0.1, base=base, weight_decay=0.0, weights="auto", momentum=0.9)
    assert distance(play(opt, params, grads), play(twin, twins, grads)) < 1e-13


def test_an_error_is_paid_out_whole_over_the_following_steps() -> None:
    """One rounding error, then no gradients: the weight moves by exactly the error in total."""
    p = nn.Parameter(torch.tensor([[0.0, 6.35]], dtype=torch.float64))
    opt = ECO([p], 1.0, base="sgdm", weight_decay=0.0, weights=Grid(scale=0.05, stochastic=False), backend="eager")
    p.grad = torch.tensor([[-0.2, 0.0]], dtype=torch.float64)  # moves by 0.02 in this step, 0.2 in all
    opt.step()
    buffer = opt.state[p]["momentum_buffer"]
    # what is still to come: buf (b + b^2 + ...) = buf b / (1 - b)
    assert float(p.detach()[0, 0]) == 0.0
    assert float(-buffer[0, 0] * 0.9 / 0.1) == pytest.approx(0.2, abs=1e-12)


@pytest.mark.parametrize("weights", ["int8", "int4", "fp8"])
def test_the_parameters_hold_values_of_the_grid_only(weights: Any) -> None:
    from poise.memory.grid import GRIDS

    net = nn.Sequential(OrderedDict(body=nn.Linear(32, 48), act=nn.Tanh(), lm_head=nn.Linear(48, 4)))
    opt = ECO(net, 0.01, weights=weights)
    for _ in range(3):
        opt.zero_grad()
        net(torch.ones(2, 32)).square().sum().backward()
        opt.step()
    first, head = net[0].weight.detach(), net[2].weight.detach()  # type: ignore[union-attr]
    assert distance([GRIDS[weights].rounded(first)], [first]) < 1e-6
    assert len(first[0].unique()) <= 2 * GRIDS[weights].largest + 1
    assert distance([GRIDS[weights].rounded(head)], [head]) > 1e-4  # an output head stays as it is


def test_it_learns_on_a_coarse_grid_where_rounding_alone_does_worse() -> None:
    x = torch.randn(256, 32, generator=torch.Generator().manual_seed(1))
    y = (x @ torch.randn(32, 8, generator=torch.Generator().manual_seed(2))).argmax(1)

    def loss(make: Any) -> float:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
        opt = make(net)
        for _ in range(200):
            opt.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            opt.step()
        return float(nn.functional.cross_entropy(net(x), y).detach())

    coarse: Any = Grid(4, group=128, stochastic=False)
    eco, naive = loss(lambda n: ECO(n, 2e-3, weights=coarse)), loss(lambda n: AdamW(n, 2e-3, weights=coarse))
    assert eco < 0.5 * naive


def test_every_backend_hands_the_same_errors_on() -> None:
    start, grads = draw([(16, 300), (8, 5)], 6, dtype=torch.float32)
    ends = []
    for backend in ("eager", "chunks", "auto"):
        params = leaves(start)
        ends.append(play(ECO(params, 0.01, weights=NEAREST, backend=backend), params, grads))
    assert distance(ends[0], ends[1]) < 1e-5 and distance(ends[0], ends[2]) < 1e-5


@pytest.mark.parametrize("weights", ["int8", "int4", "fp8"])
def test_native_tiles_round_to_a_grid_as_plain_torch_does(weights: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    eagerly: list[tuple[int, ...]] = []
    plainly = Grid.rounded
    monkeypatch.setattr(
        Grid, "rounded", lambda grid, x, noise=None: (eagerly.append(tuple(x.shape)), plainly(grid, x, noise))[1]
    )
    # rows longer than a tile, rows of several groups, groups that do not make up a row, three dimensions
    start, grads = draw([(3, 20480), (24, 256), (16, 300), (12, 16, 8)], 4, dtype=torch.float32)
    ends = []
    for backend in ("eager", "tiles"):
        eagerly.clear()
        params = leaves(start)
        ends.append(play(ECO(params, 0.01, weights=weights, backend=backend), params, grads))
    assert set(eagerly) == ({(16, 300)} if weights == "int4" else set())
    for eager, native in zip(*ends, strict=True):
        # a sum rounded once in place of twice may turn a weight's rounding, of few weights and by one step of the grid
        moved = (eager - native).abs() > 1e-5 * eager.abs().amax()
        assert float(moved.double().mean()) < 0.005
        assert float((eager - native).abs().max()) < 0.2 * float(eager.abs().max())


def test_save_and_resume_change_nothing() -> None:
    start, grads = draw([(16, 300)], 8, dtype=torch.float32)
    whole, halves = leaves(start), leaves(start)
    play(ECO(whole, 0.01, two_errors=True), whole, grads)
    opt = ECO(halves, 0.01, two_errors=True)
    play(opt, halves, grads[:4])
    saved = opt.state_dict()
    opt = ECO(halves, 0.01, two_errors=True)
    opt.load_state_dict(saved)
    assert same(play(opt, halves, grads[4:]), whole)


@pytest.mark.parametrize(
    "wrong", [{"base": "lion"}, {"betas": (0.0, 0.9)}, {"base": "sgdm", "momentum": 0.0}, {"weights": "int3"}]
)
def test_settings_that_cannot_be_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=list(wrong)[-1]):
        ECO([nn.Parameter(torch.zeros(4, 4))], **wrong)
