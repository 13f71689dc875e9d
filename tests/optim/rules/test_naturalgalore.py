"""Natural GaLore (Natural GaLore: Accelerating GaLore, arXiv 2410.16029)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from conformance.problems import Grads, distance, draw, leaves, play
from optim.toys import numbers, optimizer, zeros
from torch import Tensor

from poise.optim import GaLore, NaturalGaLore
from poise.optim.rules.naturalgalore import windowed_natural
from poise.optim.transforms.step import identity

natural = partial(NaturalGaLore, backend="eager")

TYPICAL: dict[str, Any] = {"rank": 8, "history": 3, "update_proj_gap": 4, "on_refresh": "rotate", "eps": 1e-8}
CASES: list[dict[str, Any]] = [
    {"rank": 4, "history": 3, "update_proj_gap": 5, "weight_decay": 0.3, "damping": 10.0},
    {"rank": 4, "history": 2, "update_proj_gap": 3, "side": "both", "damping": 0.1, "eps": 1e-8, "adamw_lr": 1e-3},
    {"rank": 3, "history": 4, "update_proj_gap": 3, "clear_history": False, "on_refresh": "rotate", "eps": 1e-8},
]


def reference(
    params: Sequence[Tensor],
    grads: Grads,
    *,
    lr: float | Sequence[float],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    rank: int = 128,
    history: int = 20,
    damping: float = 1e-3,
    update_proj_gap: int = 200,
    proj_scale: float = 0.25,
    side: str = "short",
    clear_history: bool = True,
    on_refresh: str = "keep",
    adamw_lr: float | None = None,
) -> list[Tensor]:
    """The Fisher matrix made and solved whole, between factors A and B of both sides."""
    rates = list(lr) if isinstance(lr, Sequence) else [lr] * len(grads)
    b1, b2 = betas
    ends = []
    for index, start in enumerate(params):
        matrix = start.ndim > 1 and min(len(start), start[0].numel()) > 1
        w = start.double().reshape(len(start), -1) if matrix else start.double()
        m, v, t = torch.zeros(()).double(), torch.zeros(()).double(), 0
        A, B = torch.zeros(()).double(), torch.zeros(()).double()
        window: list[Tensor] = []
        for rate, row in zip(rates, grads, strict=True):
            gradient = row[index]
            if gradient is None:
                continue
            g = gradient.double().reshape(w.shape)
            if matrix:
                left, right = g.shape[0] < g.shape[1] or side == "both", g.shape[0] >= g.shape[1] or side == "both"
                r = min(rank, *g.shape)
                if t % update_proj_gap == 0:
                    U, _, Vh = torch.linalg.svd(g, full_matrices=False)
                    new_A = U[:, :r].T if left else torch.eye(len(g)).double()
                    new_B = Vh[:r] if right else torch.eye(g.shape[1]).double()
                    if t and on_refresh == "keep":
                        new_A, new_B = (torch.diag((a * b).sum(1).sign()) @ a for a, b in ((new_A, A), (new_B, B)))
                    elif t:
                        TA, TB = new_A @ A.T, new_B @ B.T
                        m, v = TA @ m @ TB.T, TA**2 @ v @ (TB**2).T
                        window = [TA @ old @ TB.T for old in window]
                    A, B = new_A, new_B
                    window = [] if clear_history else window
                g = A @ g @ B.T
                window = [*window, g][-history:]
                fisher = damping * torch.eye(g.numel()).double() + sum(torch.outer(x.flatten(), x.flatten()) for x in window)
                g = torch.linalg.solve(fisher, g.flatten()).reshape(g.shape)
            elif adamw_lr is not None:
                rate = adamw_lr * rate / rates[0]
            t += 1
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            u = math.sqrt(1 - b2**t) / (1 - b1**t) * m / (v.sqrt() + eps)
            w = (w - rate * (proj_scale * A.T @ u @ B if matrix else u)) * (1 - rate * weight_decay)
        ends.append(w.reshape(start.shape))
    return ends


def naturals(rows: Sequence[Tensor], **settings: Any) -> list[Tensor]:
    """What the link alone makes of gradients that come one after another."""
    params = zeros(tuple(rows[0].shape), dtype=rows[0].dtype)
    opt = optimizer(params, windowed_natural(identity(), **settings), lr=1.0)
    found, before = [], torch.zeros_like(rows[0])
    for row in rows:
        after = play(opt, params, [[row]])[0]
        found.append(before - after)
        before = after
    return found


def test_each_is_the_solution_of_the_dense_system_of_its_window() -> None:
    rows = [row[0] for row in draw([(6, 4)], 12)[1] if row[0] is not None]
    for t, found in enumerate(naturals(rows, history=5, damping=0.1)):
        window = torch.stack([g.flatten() for g in rows[max(t - 4, 0) : t + 1]])
        wanted = torch.linalg.solve(0.1 * torch.eye(24).double() + window.T @ window, rows[t].flatten())
        assert distance([found.flatten()], [wanted]) < 1e-12


def test_alone_in_its_window_a_gradient_is_divided_by_its_squared_length() -> None:
    rows = [row[0] for row in draw([(6, 4)], 4)[1] if row[0] is not None]
    for g, found in zip(rows, naturals(rows, history=1, damping=1e-3), strict=True):
        assert distance([found], [g / (1e-3 + g.square().sum())]) < 1e-15


@pytest.mark.parametrize("dtype, scale, tolerance", [(torch.float64, 1.0, 1e-11), (torch.float32, 300.0, 1e-6)])
def test_the_same_gradient_again_and_again_counts_each_time(dtype: torch.dtype, scale: float, tolerance: float) -> None:
    """In float32 ||g||^2 is here 2e9 times the damping, and a difference of g and a multiple of g would be noise."""
    g = scale * draw([(6, 4)], 0, dtype=dtype)[0][0]
    for t, found in enumerate(naturals([g] * 6, history=4, damping=1e-3)):
        wanted = g.double() / (1e-3 + min(t + 1, 4) * g.double().square().sum())
        # weights were written between, each of them no larger than a few times the update
        assert distance([found / wanted.norm()], [wanted / wanted.norm()]) < tolerance


@pytest.mark.parametrize("side", ["short", "both"])
def test_with_large_damping_it_is_galore(side: Any) -> None:
    start, grads = draw([(9, 6), (5,)], 9)
    ours, theirs = leaves(start), leaves(start)
    found = play(natural(ours, rank=3, update_proj_gap=4, damping=1e12, eps=1e-18, adamw_lr=0.0, side=side), ours, grads)
    galore = GaLore(theirs, rank=3, update_proj_gap=4, eps=1e-6, adamw_lr=0.0, side=side, backend="eager")
    assert distance(found, play(galore, theirs, grads)) < 1e-9


def test_the_window_is_emptied_with_each_projection_unless_it_is_kept() -> None:
    start, grads = draw([(9, 6)], 5)
    rows = []
    for clear in (True, False):
        (p,) = params = leaves(start)
        opt = natural(params, rank=3, history=8, update_proj_gap=4, clear_history=clear)
        play(opt, params, grads)
        (window,) = [value for key, value in opt.state[p].items() if key.endswith("window")]
        rows.append(int(window.flatten(1).any(1).sum()))
    assert rows == [1, 5]


def test_what_the_window_has_seen_is_taken_out_and_what_is_new_stays() -> None:
    """Two orthogonal directions: one seen three times before, and one that comes in with the fourth gradient."""
    Q = torch.linalg.qr(draw([(24, 2)], 0)[0][0])[0]
    old, new = (Q[:, i].reshape(6, 4) for i in range(2))
    found = naturals([3 * old] * 3 + [3 * old + new], history=4, damping=0.01)[-1]
    # of the 2 x 2 system ( 0.01 + 36, 3; 3, 0.01 + 1 ) n = (3, 1)
    wanted = torch.linalg.solve(numbers(36.01, 3.0, 3.0, 1.01).reshape(2, 2), numbers(3.0, 1.0))
    assert distance([found], [wanted[0] * old + wanted[1] * new]) < 1e-12
    assert abs(float(wanted[0] / wanted[1])) < 0.01  # of a gradient that was 3 : 1


@pytest.mark.parametrize("side, small", [("short", 64 * 256), ("both", 64 * 64)])
def test_the_window_adds_its_length_times_the_projection(side: Any, small: int) -> None:
    params = leaves([torch.zeros(256, 128)])
    galore = GaLore(params, rank=64, side=side).state_bytes()
    assert natural(params, rank=64, side=side).state_bytes() == galore + 4 * 20 * small
    assert natural(params, rank=64, side=side, state="int8").state_bytes() < 0.27 * (galore + 4 * 20 * small)


def test_experts_have_windows_of_their_own() -> None:
    class Experts(torch.nn.Module):
        def __init__(self, stack: Tensor) -> None:
            super().__init__()
            self.experts = torch.nn.Module()
            self.experts.w1 = torch.nn.Parameter(stack.clone())

    start, grads = draw([(3, 8, 5)], 5)
    model = Experts(start[0])
    settings: dict[str, Any] = {"rank": 2, "history": 3, "update_proj_gap": 4, "on_refresh": "rotate", "clear_history": False}
    (found,) = play(natural(model, **settings), list(model.parameters()), grads)
    for i in range(3):
        alone = leaves([start[0][i]])
        rows: Grads = [[g[i] for g in row if g is not None] for row in grads]
        assert distance([found[i]], play(natural(alone, **settings), alone, rows)) < 1e-10


@pytest.mark.parametrize("options, named", [({"history": 0}, "history=0"), ({"damping": 0.0}, "damping=0.0")])
def test_bad_settings_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        natural(leaves([torch.zeros(4, 4)]), **options)
