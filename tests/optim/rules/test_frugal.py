"""FRUGAL (FRUGAL: Memory-Efficient Optimization by Reducing State Overhead, arXiv 2411.07837)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from conformance.problems import Grads, distance, draw, leaves, play, same
from torch import Tensor

from poise.linalg.projectors import Projector
from poise.optim import FRUGAL, AdamW, GaLore, Signum
from poise.optim.transforms.adaptive import adam
from poise.optim.transforms.turns import Order, in_turn

frugal = partial(FRUGAL, backend="eager")

TYPICAL: dict[str, Any] = {"order": "ascending", "update_gap": 2}
CASES: list[dict[str, Any]] = [
    {"order": "ascending", "update_gap": 2, "weight_decay": 0.3, "inactive_scale": 0.1},
    {"density": 0.5, "order": "mirror", "update_gap": 3, "proj_scale": 0.5, "residual": "sgd"},
    {"projection": "svd", "update_gap": 3, "betas": (0.8, 0.9), "adamw_lr": 1e-3},
    {"projection": "svd", "density": 0.5, "update_gap": 2, "on_refresh": "keep", "side": "left", "residual": "none"},
]


def reference(
    params: Sequence[Tensor],
    grads: Grads,
    *,
    lr: float | Sequence[float],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    density: float = 0.25,
    update_gap: int = 200,
    projection: str = "tensors",
    order: str = "ascending",
    side: str = "short",
    on_refresh: str = "reset",
    residual: str = "sign",
    proj_scale: float = 1.0,
    inactive_scale: float = 1.0,
    adamw_lr: float | None = None,
) -> list[Tensor]:
    """The release's steps in its order; a tensor that has state projects onto everything, one that has none onto nothing."""
    rates = list(lr) if isinstance(lr, Sequence) else [lr] * len(grads)
    b1, b2 = betas
    weights = [p.double().clone() for p in params]
    matrices = [i for i, w in enumerate(weights) if w.ndim > 1 and min(len(w), w[0].numel()) > 1]
    at_once = max(round(density * len(matrices)), 1)
    for index, start in enumerate(weights):
        w = start.reshape(len(start), -1) if index in matrices else start
        m, v, t, calls, basis, active = torch.zeros(()).double(), torch.zeros(()).double(), 0, 0, None, True
        for rate, row in zip(rates, grads, strict=True):
            gradient = row[index]
            if gradient is None:
                continue
            g = gradient.double().reshape(w.shape)
            if index not in matrices:
                rate = rate if adamw_lr is None else adamw_lr * rate / rates[0]
                m, v, t = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2, t + 1
                w = w * (1 - rate * weight_decay) - rate * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
                continue
            left = {"short": w.shape[0] < w.shape[1], "left": True}[side]
            if calls % update_gap == 0:
                turn, place, count = calls // update_gap, matrices.index(index), len(matrices)
                if projection == "svd":
                    U, _, Vh = torch.linalg.svd(g, full_matrices=False)
                    new = U[:, : round(density * len(U))].T if left else Vh[: round(density * Vh.shape[1])]
                    if basis is not None and on_refresh == "keep":
                        new = torch.diag((new * basis).sum(1).sign()) @ new
                    basis = new
                elif order == "mirror":
                    pairs, half = max(round(density * count / 2), 1), count // 2
                    active = min(place, count - 1 - place) in [(turn * pairs + i) % half for i in range(pairs)]
                    active = active and place != count - 1 - place
                else:
                    active = place in [(turn * at_once + i) % count for i in range(at_once)]
                if on_refresh == "reset":
                    m, v, t = torch.zeros_like(m), torch.zeros_like(v), 0
            if basis is None:
                inside, outside = (g, torch.zeros_like(g)) if active else (torch.zeros_like(g), g)
            else:
                inside = basis @ g if left else g @ basis.T
                outside = g - (basis.T @ inside if left else inside @ basis)
            calls, t = calls + 1, t + 1
            m, v = b1 * m + (1 - b1) * inside, b2 * v + (1 - b2) * inside**2
            u = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
            if basis is not None:
                u = basis.T @ u if left else u @ basis
            rest = {"sign": torch.sign(outside), "sgd": outside, "none": torch.zeros_like(outside)}[residual]
            w = w * (1 - rate * weight_decay) - rate * proj_scale * (u + inactive_scale * rest)
        weights[index] = w.reshape(start.shape)
    return weights


def held(opt: torch.optim.Optimizer, params: Sequence[Tensor]) -> int:
    """Bytes of memory behind the moments of these parameters, counted by their storages."""
    return sum(v.untyped_storage().nbytes() for p in params for key, v in opt.state[p].items() if "exp_avg" in key)


def have_state(opt: torch.optim.Optimizer, params: Sequence[Tensor]) -> list[int]:
    return [i for i, p in enumerate(params) if held(opt, [p]) >= 2 * p.nbytes]


SQUARES: list[tuple[int, ...]] = [(8, 8)] * 8


@pytest.mark.parametrize("projection", ["tensors", "columns", "rows", "entries", "permuted"])
def test_with_everything_in_the_subspace_it_is_adamw_that_forgets_when_a_period_ends(projection: Any) -> None:
    start, grads = draw([(9, 6), (6, 9), (5,)], 10)
    ours, plain = leaves(start), leaves(start)
    hyper: dict[str, Any] = {"weight_decay": 0.1, "backend": "eager"}
    opt = frugal(ours, lr=0.01, density=1.0, projection=projection, update_gap=5, weight_decay=0.1)
    adamw = AdamW(plain, lr=0.01, **hyper)
    assert distance(play(opt, ours, grads[:5]), play(adamw, plain, grads[:5])) < 1e-15
    afresh = AdamW(plain[:2], lr=0.01, **hyper)
    found, wanted = play(opt, ours, grads[5:]), play(afresh, plain[:2], [row[:2] for row in grads[5:]])
    assert distance(found[:2], wanted) < 1e-15


def test_with_nothing_in_the_subspace_it_is_sign_descent() -> None:
    start, grads = draw([(9, 6), (6, 9)], 10)
    ours, plain = leaves(start), leaves(start)
    opt = frugal(ours, lr=0.01, density=0.0, weight_decay=0.1)
    signs = Signum(plain, lr=0.01, momentum=0.0, weight_decay=0.1, backend="eager")
    assert same(play(opt, ours, grads), play(signs, plain, grads))
    assert opt.state_bytes() == 0


def test_without_a_residual_and_a_reset_it_is_galore() -> None:
    start, grads = draw([(16, 8), (8, 16), (12, 12)], 9)
    ours, theirs = leaves(start), leaves(start)
    opt = frugal(ours, lr=0.01, density=0.25, projection="svd", update_gap=3, on_refresh="keep", residual="none",
                 proj_scale=0.25, inner=adam(eps=1e-6, eps_at="uncorrected"), weight_decay=0.1)  # fmt: skip
    galore = GaLore(theirs, lr=0.01, rank=0.25, update_proj_gap=3, weight_decay=0.1, decay="coupled", backend="eager")
    assert same(play(opt, ours, grads), play(galore, theirs, grads))
    assert [tuple(opt.state[p]["0.projected.0.adam.exp_avg"].shape) for p in ours] == [(16, 2), (2, 16), (12, 3)]


@pytest.mark.parametrize("projection", ["svd", "randomized", "random", "permuted", "columns", "rows", "entries"])
@pytest.mark.parametrize("shape", [(16, 8), (8, 16)])
def test_a_step_is_adam_inside_the_subspace_and_signs_outside(projection: Any, shape: tuple[int, int]) -> None:
    """On the first step, with a basis that is read from the state; a second optimizer with another seed has another one."""
    start, grads = draw([shape], 1)
    bases = []
    for seed in (0, 1):
        params = leaves(start)
        opt = frugal(params, lr=1.0, projection=projection, inactive_scale=0.5, weight_decay=0.0, seed=seed)
        moved = start[0] - play(opt, params, grads)[0]
        projector, basis, g = Projector(projection, 0.25), opt.state[params[0]]["basis"], grads[0][0]
        assert g is not None
        low = projector.project(g, basis)
        left = g - projector.back(low, basis, *shape)
        assert float(projector.project(left, basis).abs().max()) < 1e-12
        wanted = projector.back(low / (low.abs() + 1e-8), basis, *shape) + 0.5 * torch.sign(left)
        assert distance([moved], [wanted]) < 1e-12
        assert torch.linalg.matrix_rank(moved) == 8
        bases.append(basis)
    assert torch.equal(*bases) == (projection == "svd")


@pytest.mark.parametrize("projection", ["random", "columns"])
def test_every_period_has_another_random_subspace_and_every_matrix_its_own(projection: Any) -> None:
    start, grads = draw([(64, 64), (64, 64)], 7)
    params = leaves(start)
    opt = frugal(params, projection=projection, update_gap=3)
    seen: list[Tensor] = []
    for row in grads:
        play(opt, params, [row])
        seen.append(opt.state[params[0]]["basis"].clone())
    assert [torch.equal(a, b) for a, b in itertools.pairwise(seen)] == [True, True, False, True, True, False]
    assert not torch.equal(*[opt.state[p]["basis"] for p in params])


@pytest.mark.parametrize("order", ["random", "ascending", "descending", "mirror"])
def test_a_share_of_the_tensors_has_state_and_the_others_take_no_memory(order: Any) -> None:
    """Measured by the storages behind the state: 2 rho of the matrices, and one number for each that rests."""
    start, grads = draw(SQUARES, 9, dtype=torch.float32)
    params = leaves(start)
    opt = frugal(params, order=order, update_gap=3)
    dense = 2 * sum(p.nbytes for p in params)
    assert held(opt, params) == 8 * 2 * 4
    turns = []
    for row in grads:
        play(opt, params, [row])
        assert held(opt, params) == opt.state_bytes() == 0.25 * dense + 6 * 2 * 4
        turns.append(have_state(opt, params))
    wanted = {
        "ascending": [[0, 1], [2, 3], [4, 5]],
        "descending": [[6, 7], [4, 5], [2, 3]],
        "mirror": [[0, 7], [1, 6], [2, 5]],
    }
    assert turns[::3] == turns[1::3] == turns[2::3]
    assert order == "random" or turns[::3] == wanted[order]


def test_random_turns_are_fair_exact_and_the_same_for_one_seed() -> None:
    rule, again, other = (in_turn(adam(), 0.25, seed=seed) for seed in (0, 0, 1))
    turns = [rule.turn(i, 12) for i in range(800)]
    assert {len(turn) for turn in turns} == {3}
    assert turns == [again.turn(i, 12) for i in range(800)] != [other.turn(i, 12) for i in range(800)]
    for place in range(12):  # 200 in the mean, with a standard deviation of 12
        assert 150 < sum(place in turn for turn in turns) < 250


@pytest.mark.parametrize("order", ["ascending", "descending", "mirror"])
@pytest.mark.parametrize("count", [7, 8])
def test_turns_go_round_until_all_but_the_middle_of_a_mirrored_row_have_had_one(order: Order, count: int) -> None:
    rule = in_turn(adam(), 0.3, order=order)
    had = set().union(*[rule.turn(i, count) for i in range(8)])
    assert had == set(range(count)) - ({3} if order == "mirror" and count == 7 else set())


def test_what_has_no_turn_moves_by_signs() -> None:
    start, grads = draw(SQUARES, 1)
    params = leaves(start)
    opt = frugal(params, lr=0.01, inactive_scale=0.1, order="ascending", weight_decay=0.0)
    for i, (before, after) in enumerate(zip(start, play(opt, params, grads), strict=True)):
        g = grads[0][i]
        assert g is not None
        assert distance([before - after], [0.01 * torch.sign(g) * (1.0 if i < 2 else 0.1)]) < 1e-7


def test_turns_go_over_all_groups() -> None:
    start, _ = draw(SQUARES, 0)
    params = leaves(start)
    opt = frugal([{"params": params[:3]}, {"params": params[3:], "lr": 0.1}], order="descending")
    play(opt, params, [list(start)])
    assert have_state(opt, params) == [6, 7]


@pytest.mark.parametrize("state", ["fp32", "int4"])
def test_saving_loading_previews_and_copies_wake_nothing_that_rests(state: str) -> None:
    shapes: list[tuple[int, ...]] = [(64, 128)] * 4
    start, grads = draw(shapes, 6, dtype=torch.float32)
    params, fresh = leaves(start), leaves(start)
    opt = frugal(params, update_gap=2, state=state)
    plain = opt.state_bytes()
    halfway = play(opt, params, grads[:3])
    awake = opt.state_bytes()
    assert plain < 100 < awake
    opt.preview()
    opt.restore(opt.snapshot())
    twin = copy.deepcopy(opt)
    saved = opt.state_dict()
    assert all(v.is_contiguous() for slots in saved["state"].values() for v in slots.values())
    again = frugal(fresh, update_gap=2, state=state)
    again.load_state_dict(copy.deepcopy(saved))
    assert opt.state_bytes() == twin.state_bytes() == again.state_bytes() == awake
    for p, q in zip(fresh, halfway, strict=True):
        p.data.copy_(q)
    assert same(play(again, fresh, grads[3:]), play(opt, params, grads[3:]))
    opt.begin_anew()
    assert opt.state_bytes() == plain


@pytest.mark.parametrize(
    "options, named",
    [
        ({"density": 1.5}, "density=1.5"),
        ({"density": 0.0, "residual": "none"}, "would train no matrix"),
        ({"update_gap": 0}, "update_gap=0"),
        ({"update_gap": 0, "projection": "svd"}, "gap=0"),
        ({"projection": "randk"}, "projection='randk'"),
        ({"order": "up"}, "order='up'"),
        ({"residual": "lion"}, "residual='lion'"),
        ({"projection": "permuted", "side": "both"}, "side='both'"),
        ({"inactive_scale": -0.1}, "inactive_scale=-0.1"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        frugal(leaves([torch.zeros(4, 4)]), **options)
