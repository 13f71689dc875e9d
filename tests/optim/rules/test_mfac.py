"""M-FAC (M-FAC: Efficient Matrix-Free Approximations of Second-Order Information, arXiv 2107.03356)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from conformance.problems import Grads, distance, draw, leaves, play, same
from optim.references import inverse_fisher
from torch import Tensor

from poise.linalg.fisher_window import FisherWindow
from poise.optim import MFAC, Route, everything
from poise.optim.optimizer import Optimizer
from poise.optim.routing import by_name
from poise.optim.transform import chain
from poise.optim.transforms.gradient_window import DenseRows, fisher, windowed

mfac = partial(MFAC, backend="eager")

# A window so long that each of a few steps moves bfloat16 weights: F^(-1) g is m / |g|^2 times g at first.
TYPICAL: dict[str, Any] = {"window": 256, "momentum": 0.5, "damping": 1e-2}
CASES: list[dict[str, Any]] = [
    {"window": 3, "damping": 2e3},
    {"window": 4, "damping": 0.1, "momentum": 0.6, "weight_decay": 0.3, "window_dtype": torch.bfloat16},
    {"window": 2, "damping": 20.0, "per": "tensor", "weight_decay": 0.1, "decay": "coupled"},
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
    per: str = "model",
    window_dtype: torch.dtype = torch.float32,
    decay: str = "l2",
) -> list[Tensor]:
    """Every gradient one long vector, zero where a parameter had none; the oldest leaves the list as a new one comes."""
    rates = list(lr) if isinstance(lr, Sequence) else [lr] * len(grads)
    weights = [p.double().clone() for p in params]
    averages = [torch.zeros_like(w) for w in weights]
    groups = [range(len(weights))] if per == "model" else [[i] for i in range(len(weights))]
    windows: list[list[Tensor]] = [[] for _ in groups]
    for rate, row in zip(rates, grads, strict=True):
        for group, kept in zip(groups, windows, strict=True):
            pieces = []
            for i in group:
                gradient = row[i]
                g = torch.zeros_like(weights[i]) if gradient is None else gradient.double()
                pieces.append(g + (weight_decay * weights[i] if decay == "l2" and gradient is not None else 0))
            if all(row[i] is None for i in group):
                continue
            long = torch.cat([piece.flatten() for piece in pieces])
            long = long if window_dtype == torch.float32 else long.to(window_dtype).double()
            kept.append(long)
            del kept[:-window]
            steps = inverse_fisher(kept, window, damping, long).split([piece.numel() for piece in pieces])
            for i, step in zip(group, steps, strict=True):
                if row[i] is not None:
                    averages[i] = momentum * averages[i] + (1 - momentum) * step.view_as(weights[i])
                    shrink = rate * weight_decay if decay == "coupled" else 0.0
                    weights[i] = weights[i] - rate * averages[i] - shrink * weights[i]
    return weights


def flat(tensors: Sequence[Tensor | None]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors if t is not None])


def step_of(opt: Optimizer, params: list[Any], row: list[Tensor | None]) -> Tensor:
    """What the next step would subtract at lr 1, over all parameters."""
    shown = opt.preview({p: g for p, g in zip(params, row, strict=True) if g is not None})
    return -flat(list(shown.values()))


SMALL = [(6, 5), (5,), (3, 2, 2)]


def test_it_is_the_static_algorithm_on_the_gradients_in_the_window() -> None:
    start, grads = draw(SMALL, 8)
    params = leaves(start)
    opt = mfac(params, lr=1.0, window=5, damping=0.01)
    play(opt, params, grads[:7])
    last = torch.stack([flat(row) for row in grads[3:]])
    assert distance([step_of(opt, params, grads[7])], [FisherWindow(last, 0.01).solve(last[-1])]) < 1e-10


def test_neither_the_order_nor_the_place_of_the_gradients_before_matters() -> None:
    start, grads = draw(SMALL, 7)
    ends = []
    for order in ([0, 1, 2, 3, 4, 5], [0, 1, 4, 2, 5, 3], [2, 3, 4, 5]):  # of the first two, nothing is left
        params = leaves(start)
        opt = mfac(params, lr=1.0, window=5, damping=0.01)
        play(opt, params, [grads[i] for i in order])
        ends.append([step_of(opt, params, grads[6])])
    assert distance(ends[1], ends[0]) < 1e-11
    assert distance(ends[2], ends[0]) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_window_of_one_divides_by_the_squared_length_and_the_damping(dtype: torch.dtype) -> None:
    """In float32 too, where all but 1e-9 of g / damping would cancel."""
    start, grads = draw(SMALL, 3, dtype=dtype)
    params = leaves(start)
    opt = mfac(params, lr=1.0, window=1, damping=1e-7)
    play(opt, params, grads[:2])
    g = flat(grads[2]).double()
    found = step_of(opt, params, grads[2]).double()
    assert float((found * (1e-7 + g @ g) / g - 1).abs().max()) < (1e-12 if dtype == torch.float64 else 1e-5)


def test_the_whole_model_is_one_vector_or_each_parameter_its_own() -> None:
    start, grads = draw(SMALL, 3)
    for per in ("model", "tensor"):
        params = leaves(start)
        opt = mfac(params, lr=1.0, window=3, damping=0.1, per=per)
        play(opt, params, grads[:2])
        found = opt.preview(grads[2])  # type: ignore[arg-type]
        alone = []
        for i, p in enumerate(leaves(start)):
            other = mfac([p], lr=1.0, window=3, damping=0.1)
            play(other, [p], [[row[i]] for row in grads[:2]])
            alone += other.preview([grads[2][i]]).values()  # type: ignore[list-item]
        gap = distance(list(found.values()), alone)
        assert gap < 1e-12 if per == "tensor" else gap > 1e-2


def test_a_parameter_away_for_longer_than_the_window_comes_back_with_an_empty_one() -> None:
    """Its rows are older than those of the others in the same places, and count as zeros."""
    start, grads = draw(SMALL, 7, missing=[(t, 1) for t in (2, 3, 4, 5)])
    params, late = leaves(start), leaves(start)
    opt, fresh = (mfac(p, lr=1.0, window=3, damping=0.01) for p in (params, late))
    play(opt, params, grads[:6])
    play(fresh, late, [[row[0], None, row[2]] for row in grads[:6]])
    assert distance([step_of(opt, params, grads[6])], [step_of(fresh, late, grads[6])]) < 1e-12


def test_a_window_in_bfloat16_preconditions_the_rounded_gradient() -> None:
    """Products, too, are of what is kept: nearly equal gradients would else seem to be what no vectors are."""
    start, noise = draw(SMALL, 5, dtype=torch.float32)
    grads: Grads = [[a + 0.1 * b for a, b in zip(start, row, strict=True) if b is not None] for row in noise]
    params = leaves(start)
    opt = mfac(params, lr=1.0, window=4, damping=1e-2, window_dtype=torch.bfloat16)
    play(opt, params, grads[:4])
    rounded = torch.stack([flat(row).bfloat16().double() for row in grads[1:]])
    wanted = FisherWindow(rounded, 1e-2).solve(rounded[-1])
    assert float((step_of(opt, params, grads[4]).double() - wanted).norm() / wanted.norm()) < 1e-3
    window = opt.state[params[0]]["window"]
    assert window.dtype is torch.bfloat16
    assert window.shape == (4, 6, 5)


def test_one_window_over_two_rules_is_that_of_one() -> None:
    start, grads = draw(SMALL, 5)
    link = windowed(DenseRows(), 3, fisher, {"damping": 0.1})
    together, apart = leaves(start), leaves(start)
    wanted = play(Optimizer(together, chain(link), 0.1, backend="eager"), together, grads)
    shared = windowed(DenseRows(), 3, fisher, {"damping": 0.1})
    routes = [Route("a", chain(shared), by_name("a*")), Route("b", chain(shared), everything)]
    named = list(zip("axb", apart, strict=True))
    assert distance(play(Optimizer(named, routes, 0.1, backend="eager"), apart, grads), wanted) < 1e-13


def test_only_the_new_row_is_written() -> None:
    start, grads = draw(SMALL, 4)
    params = leaves(start)
    opt = mfac(params, lr=0.1, window=3)
    window = opt.state[params[0]]["window"]
    play(opt, params, grads[:3])
    before = window.clone()
    play(opt, params, grads[3:])
    assert opt.state[params[0]]["window"] is window
    assert same([window[1], window[2]], [before[1], before[2]])
    assert same([window[0]], [grads[3][0]])  # type: ignore[list-item]


@pytest.mark.parametrize(
    "wrong", [{"damping": 0.0}, {"window": 0}, {"window": 2.5}, {"per": "layer"}, {"window_dtype": torch.float16}]
)
def test_bad_settings_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MFAC(leaves([torch.zeros(3)]), **wrong)


def test_bfloat16_weights_move_on_average_as_their_float32_twins() -> None:
    drift = draw([(64, 128)], 0, dtype=torch.float32)[0][0].sign()
    ends = []
    for dtype in (torch.float32, torch.bfloat16):
        params = leaves([torch.ones(64, 128)], dtype)
        opt = mfac(params, lr=0.1, window=8)
        ends.append(play(opt, params, [[drift]] * 50)[0].double() - 1)
    assert float((ends[0] * ends[1]).sum() / ends[0].square().sum()) == pytest.approx(1.0, abs=0.1)
    assert 5e-4 < float(ends[0].abs().max()) < 2e-3  # steps far below the distance of neighbouring weights


def test_a_run_resumed_while_the_window_turns_is_bitwise_the_same() -> None:
    start, grads = draw(SMALL, 8, missing=[(2, 0), (5, 1)])
    params = leaves(start)
    opt = mfac(params, window=3, damping=0.1)
    fresh = leaves(play(opt, params, grads[:4]))
    again = mfac(fresh, window=3, damping=0.1)
    again.load_state_dict(opt.state_dict())
    assert same(play(again, fresh, grads[4:]), play(opt, params, grads[4:]))
