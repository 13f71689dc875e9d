"""EFCP (Error Feedback Can Accurately Compress Preconditioners, arXiv 2306.06098)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from conformance.cases import batch, loss_of, net
from conformance.problems import Grads, distance, draw, leaves, play, same
from optim.references import inverse_fisher
from torch import Tensor, nn

from poise.optim import EFCP, MFAC
from poise.optim.rules.efcp import ggt

efcp = partial(EFCP, backend="eager")

TYPICAL: dict[str, Any] = {"window": 256, "density": 0.2, "momentum": 0.5, "damping": 1e-2}
CASES: list[dict[str, Any]] = [
    {"window": 3, "damping": 2e2, "density": 0.07, "block": 1000, "weight_decay": 0.3},
    {"window": 2, "damping": 10.0, "per": "tensor", "momentum": 0.6, "density": 0.3, "value_dtype": torch.float32},
    {"window": 3, "damping": 20.0, "preconditioner": "ggt", "window_decay": 0.8, "density": 0.1},
    {"window": 3, "damping": 2e3, "compressor": "lowrank", "rank": 64, "decay": "l2", "weight_decay": 0.1},
]


def reference(
    params: Sequence[Tensor],
    grads: Grads,
    *,
    lr: float | Sequence[float],
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    window: int = 1024,
    damping: float = 1e-5,
    compressor: str = "topk",
    preconditioner: str = "m-fac",
    density: float = 0.01,
    block: int = 4096,
    value_dtype: torch.dtype = torch.bfloat16,
    rank: int = 1,
    window_decay: float = 1.0,
    per: str = "model",
    decay: str = "coupled",
) -> list[Tensor]:
    """Dense vectors throughout; factors are of full rank, which compress nothing."""
    rates = list(lr) if isinstance(lr, Sequence) else [lr] * len(grads)
    weights = [p.double().clone() for p in params]
    averages, errors = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    groups = [range(len(weights))] if per == "model" else [[i] for i in range(len(weights))]
    windows: list[list[Tensor]] = [[] for _ in groups]

    def compressed(i: int, g: Tensor) -> Tensor:
        if compressor == "lowrank":
            assert min(len(g), g[0].numel()) <= rank
            return g
        errors[i] = errors[i] + g
        kept, e = torch.zeros(g.numel(), dtype=torch.float64), errors[i].flatten()
        for first in range(0, len(e), block):
            part = e[first : first + block]
            places = first + part.abs().argsort(descending=True)[: math.ceil(density * len(part))]
            kept[places] = e[places] if value_dtype == torch.float32 else e[places].to(value_dtype).double()
        errors[i] = errors[i] - kept.view_as(g)
        return kept.view_as(g)

    for rate, row in zip(rates, grads, strict=True):
        for group, kept in zip(groups, windows, strict=True):
            if all(row[i] is None for i in group):
                continue
            pieces = []
            for i in group:
                gradient = row[i]
                if gradient is None:
                    pieces.append(torch.zeros_like(weights[i]))
                else:
                    l2 = weight_decay * weights[i] if decay == "l2" else 0.0
                    pieces.append(compressed(i, gradient.double() + l2))
            long = torch.cat([piece.flatten() for piece in pieces])
            kept.append(long)
            del kept[:-window]
            if preconditioner == "ggt":
                u = dense_ggt(kept, window, damping, window_decay, long)
            else:
                u = inverse_fisher(kept, window, damping, long)
            for i, step in zip(group, u.split([piece.numel() for piece in pieces]), strict=True):
                if row[i] is not None:
                    averages[i] = momentum * averages[i] + (1 - momentum) * step.view_as(weights[i])
                    shrink = rate * weight_decay if decay == "coupled" else 0.0
                    weights[i] = weights[i] - rate * averages[i] - shrink * weights[i]
    return weights


def dense_ggt(kept: Sequence[Tensor], window: int, eps: float, decay: float, c: Tensor) -> Tensor:
    """U written out, and its complement as published."""
    columns = [decay**age * row for age, row in enumerate(reversed(kept))]
    C = torch.stack(columns + [torch.zeros_like(c)] * (window - len(columns)), 1)
    squares, V = torch.linalg.eigh(C.T @ C + 1e-6 * torch.eye(window, dtype=torch.float64))
    s = squares.sqrt()
    U = C @ V / s
    return U @ ((1 / (s + eps) - 1 / eps) * (U.T @ c)) + c / eps


SMALL = [(6, 5), (5,), (3, 2, 2)]


@pytest.mark.parametrize(
    "all_of_it",
    [{"density": 1.0, "value_dtype": torch.float32}, {"compressor": "lowrank", "rank": 9}],
    ids=["topk", "lowrank"],
)
@pytest.mark.parametrize("per", ["model", "tensor"])
def test_where_nothing_is_left_out_it_is_m_fac(all_of_it: dict[str, Any], per: Any) -> None:
    start, grads = draw([*SMALL, (4, 7)], 9, missing=[(3, 0), (6, 2)])
    ours, dense = leaves(start), leaves(start)
    settings: dict[str, Any] = {"lr": 0.1, "window": 4, "damping": 0.05, "per": per}
    wanted = play(MFAC(dense, backend="eager", **settings), dense, grads)
    assert distance(play(efcp(ours, **settings, **all_of_it), ours, grads), wanted) < 1e-8


def rows_of(state: dict[str, Tensor], r: int, shape: tuple[int, ...], top: Any) -> Tensor:
    """A row of the window, dense."""
    if "window" in state:
        return state["window"][r]
    if "left" in state:
        return (state["left"][r] @ state["right"][r].mT).reshape(shape)
    dense = torch.zeros(math.prod(shape), dtype=torch.float64)
    dense[top.where(state["places"][r], len(dense))] = state["values"][r].double()
    return dense.view(shape)


@pytest.mark.parametrize("compressor", ["topk", "lowrank"])
def test_all_compressed_gradients_and_the_error_are_all_gradients(compressor: Any) -> None:
    """Rounding to bfloat16 included."""
    start, grads = draw([(12, 10), (40,), (8, 3, 2, 2)], 9)
    params = leaves(start)
    opt = efcp(params, window=4, density=0.1, compressor=compressor, damping=0.1)
    link: Any = opt._roster.rules["windowed"].links[0]
    sums = [(torch.zeros_like(p), torch.zeros_like(p)) for p in start]
    for t, row in enumerate(grads):
        play(opt, params, [row])
        for p, g, (raw, kept) in zip(params, row, sums, strict=True):
            assert g is not None
            raw += g
            kept += rows_of(opt.state[p], t % 4, tuple(p.shape), getattr(link.rows, "top", None))
            error = opt.state[p].get("error", torch.zeros_like(raw))
            assert float((kept + error - raw).abs().max()) < 1e-10
            assert "error" not in opt.state[p] or float(error.abs().max()) > 0.1


def test_products_of_factors_are_those_of_the_matrices() -> None:
    """Gradients of rank one pass whole, so that the window is that of M-FAC."""
    generator = torch.Generator().manual_seed(0)
    start, _ = draw([(12, 10)], 0)
    columns, rows = (torch.randn(8, n, 1, generator=generator, dtype=torch.float64) for n in (12, 10))
    grads: Grads = [[c @ r.mT] for c, r in zip(columns, rows, strict=True)]
    ours, dense = leaves(start), leaves(start)
    wanted = play(MFAC(dense, lr=0.1, window=5, damping=0.1, backend="eager"), dense, grads)
    found = play(efcp(ours, lr=0.1, window=5, damping=0.1, compressor="lowrank", rank=1), ours, grads)
    assert distance(found, wanted) < 1e-8
    assert distance(found, start) > 0.01


def test_a_matrix_of_zeros_and_one_without_gradient_at_first_are_compressed_too() -> None:
    zeros = [torch.zeros(6, 8, dtype=torch.float64)]
    _, grads = draw([(6, 8)], 3)
    params = leaves(zeros)
    opt = efcp(params, lr=0.1, window=4, compressor="lowrank", rank=2)
    play(opt, params, [[zeros[0].clone()], *grads])
    assert bool(params[0].isfinite().all())
    assert float(params[0].detach().abs().min()) > 0


def test_stacked_experts_and_transposed_convolutions_are_matrices_of_outputs() -> None:
    model: Any = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ConvTranspose2d(4, 6, 3), nn.Conv2d(6, 2, 1)).double()
    twin = copy.deepcopy(model)
    assert efcp(model, window=3, compressor="lowrank").state[model[1].weight]["left"].shape == (3, 6, 1)
    mine, theirs = list(model.parameters()), list(twin.parameters())
    _, grads = draw([tuple(p.shape) for p in mine], 4)
    opt = efcp(model, lr=0.1, window=3, damping=0.1, compressor="lowrank", rank=36)
    dense_opt = MFAC(twin, lr=0.1, window=3, damping=0.1, backend="eager")
    assert distance(play(opt, mine, grads), play(dense_opt, theirs, grads)) < 1e-8
    experts = [("experts.up", torch.nn.Parameter(torch.zeros(5, 6, 7)))]
    opt = efcp(experts, window=3, compressor="lowrank", rank=2)
    state = opt.state[experts[0][1]]
    assert state["left"].shape == (3, 5, 6, 2)
    assert state["right"].shape == (3, 5, 7, 2)
    start, grads = draw([(5, 6, 7)], 4)
    whole, dense = leaves(start), leaves(start)
    named = [("experts.up", whole[0])]
    wanted = play(MFAC(dense, lr=0.1, window=3, damping=0.1, backend="eager"), dense, grads)
    assert (
        distance(play(efcp(named, lr=0.1, window=3, damping=0.1, compressor="lowrank", rank=54), whole, grads), wanted) < 1e-8
    )


def test_with_feedback_one_entry_in_a_hundred_trains_nearly_as_all_of_them() -> None:
    """And without it clearly worse."""

    def after(steps: int, **settings: Any) -> float:
        model, data = net().double(), batch(256)
        data = (data[0].double(), data[1])
        opt = settings.pop("make", efcp)(model, lr=0.03, window=32, damping=1e-3, **settings)
        for _ in range(steps):
            opt.zero_grad()
            loss_of(model, data).backward()
            opt.step()
        return float(loss_of(model, data).detach())

    dense = after(60, make=partial(MFAC, backend="eager"))
    fed, dropped = after(60), after(60, error_feedback=False)
    assert fed < dense + 0.15 * (dropped - dense)
    assert dropped > 5 * fed


def test_a_fading_window_keeps_its_directions_orthonormal() -> None:
    """Each direction is divided by its singular value: what is divided by C C^T is in its span."""
    start, grads = draw([(50, 40)], 12)
    rows = torch.stack([row[0].flatten() for row in grads if row[0] is not None])
    age = torch.arange(12).flip(0)
    w = ggt(rows @ rows.mT, 11, age, {"damping": 0.01, "window_decay": 0.9})
    fading = 0.9 ** age.double()
    U, s, _ = torch.linalg.svd((rows * fading[:, None]).mT, full_matrices=False)
    wanted = U @ ((U.mT @ rows[11]) / (s + 0.01))
    assert float((rows.mT @ w - wanted).abs().max()) < 1e-6
    params = leaves(start)
    opt = efcp(params, lr=0.01, window=10, preconditioner="ggt", window_decay=0.9, density=0.1)
    assert float(play(opt, params, grads * 10)[0].abs().max()) < 20


def test_damping_and_decay_of_a_group_take_effect() -> None:
    start, grads = draw(SMALL, 4)
    built, told = leaves(start), leaves(start)
    changed: dict[str, Any] = {"damping": 0.7, "window_decay": 0.6, "momentum": 0.3}
    settings: dict[str, Any] = {"window": 3, "density": 0.3, "preconditioner": "ggt"}
    opt = efcp(told, momentum=0.5, **settings)
    opt.param_groups[0].update(changed)
    assert distance(play(opt, told, grads), play(efcp(built, **settings, **changed), built, grads)) < 1e-14


def test_a_run_resumed_while_the_window_turns_is_bitwise_the_same() -> None:
    start, grads = draw(SMALL, 8, missing=[(2, 0), (5, 1)])
    both: list[dict[str, Any]] = [{"density": 0.3}, {"compressor": "lowrank"}]
    for settings in both:
        params = leaves(start)
        opt = efcp(params, window=3, damping=0.1, **settings)
        fresh = leaves(play(opt, params, grads[:4]))
        again = efcp(fresh, window=3, damping=0.1, **settings)
        again.load_state_dict(opt.state_dict())
        assert same(play(again, fresh, grads[4:]), play(opt, params, grads[4:]))


@pytest.mark.parametrize(
    "wrong",
    [
        {"damping": -1.0},
        {"window": 0},
        {"density": 2.0},
        {"compressor": "random"},
        {"preconditioner": "adam"},
        {"rank": 0},
        {"window_decay": 0.0},
        {"window_decay": 0.5},
        {"value_dtype": torch.int8},
    ],
)
def test_bad_settings_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EFCP(leaves([torch.zeros(3)]), **wrong)
