"""MicroAdam (MicroAdam: Accurate Adaptive Optimization with Low Space Overhead, arXiv 2405.15593)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from conformance.problems import Grads, distance, draw, leaves, play
from torch import Tensor

from poise.memory import asymmetric
from poise.optim import MicroAdam
from poise.optim.rules.microadam import micro_adam

micro = partial(MicroAdam, backend="eager")

TYPICAL: dict[str, Any] = {"window": 3, "density": 0.1}
CASES: list[dict[str, Any]] = [
    {},
    {"window": 3, "density": 0.07, "block": 100, "quant_block": 32, "weight_decay": 0.3, "betas": (0.8, 0.95), "eps": 1e-4},
    {"window": 2, "density": 0.2, "alpha": 0.3, "value_dtype": torch.float32},
    {"window": 4, "density": 0.1, "error_feedback": False},
]


def outwards(value: Tensor, up: bool) -> float:
    """The nearest bfloat16 that is not inside."""
    near = value.bfloat16()
    if (near.double() < value) if up else (near.double() > value):
        near = torch.nextafter(near, torch.tensor(math.inf if up else -math.inf, dtype=torch.bfloat16))
    return float(near)


def in_four_bits(a: Tensor, block: int) -> Tensor:
    """Block by block to the nearest of 16 levels between its ends."""
    pieces = []
    for part in a.split(block):
        lo, hi = outwards(part.min(), up=False), outwards(part.max(), up=True)
        unit = (hi - lo) / 15
        pieces.append(torch.full_like(part, lo) if unit == 0 else lo + unit * ((part - lo) / unit + 0.5).floor())
    return torch.cat(pieces)


def reference(
    params: Sequence[Tensor],
    grads: Grads,
    *,
    lr: float | Sequence[float],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    window: int = 10,
    density: float = 0.01,
    block: int = 4096,
    quant_block: int = 64,
    alpha: float = 0.0,
    value_dtype: torch.dtype = torch.bfloat16,
    error_feedback: bool = True,
) -> list[Tensor]:
    """Gradients that were kept as dense vectors in a list, newest first."""
    rates = list(lr) if isinstance(lr, Sequence) else [lr] * len(grads)
    (b1, b2), ends = betas, []
    for index, start in enumerate(params):
        w = start.double().flatten()
        e, rows, t = torch.zeros_like(w), [], 0
        for rate, row in zip(rates, grads, strict=True):
            gradient = row[index]
            if gradient is None:
                continue
            t += 1
            a = e + gradient.double().flatten()
            kept = torch.zeros_like(a)
            for first in range(0, len(a), block):
                part = a[first : first + block]
                places = first + part.abs().argsort(descending=True)[: math.ceil(density * len(part))]
                values = a[places]
                kept[places] = values if value_dtype == torch.float32 else values.to(value_dtype).double()
                a[places] = 0.0
            rows = [kept, *rows][:window]
            e = in_four_bits(a, quant_block) if error_feedback else torch.zeros_like(a)
            m = sum((1 - b1) / (1 - b1**t) * b1**age * g for age, g in enumerate(rows))
            v = sum((1 - b2) / (1 - b2**t) * b2**age * g**2 for age, g in enumerate(rows))
            u = torch.as_tensor(m) / (torch.as_tensor(v).sqrt() + eps) + alpha * e
            if alpha:
                e = in_four_bits((1 - alpha) * e, quant_block)
            w = w - rate * (u + weight_decay * w)
        ends.append(w.view_as(start))
    return ends


def test_with_all_entries_and_a_window_that_forgets_nothing_it_is_adam() -> None:
    start, grads = draw([(16, 8), (5,)], 7)
    ours, theirs = leaves(start), leaves(start)
    opt = micro(ours, lr=0.01, density=1.0, window=7, value_dtype=torch.float32)
    assert distance(play(opt, ours, grads), play(torch.optim.Adam(theirs, lr=0.01), theirs, grads)) < 1e-13


def test_entries_that_are_never_among_the_largest_move_by_their_error_alone() -> None:
    """5 large entries that alternate, 95 small ones that do not, and room for 5."""
    g = torch.full((100,), 0.1)
    moved = {}
    for feedback in (True, False):
        p = leaves([torch.zeros(100)])
        opt = micro(p, lr=1e-3, density=0.05, error_feedback=feedback)
        seen = torch.zeros(100, dtype=torch.bool)
        for t in range(400):
            g[:5] = 1.0 if t % 2 else -1.0
            before = p[0].detach().clone()
            play(opt, p, [[g]])
            seen |= p[0].detach() != before
        moved[feedback] = seen
    assert bool(moved[True].all())
    assert not bool(moved[False][5:].any())
    assert bool(moved[False][:5].all())


def test_what_is_kept_and_what_is_left_is_what_came_in_up_to_half_a_unit() -> None:
    start, grads = draw([(20, 33)], 6)
    params = leaves(start)
    opt = micro(params, density=0.05, block=128, window=4, value_dtype=torch.float32)
    state, d = opt.state[params[0]], 660
    link = opt.rule_of(opt.param_groups[0]).links[0]
    assert isinstance(link, micro_adam)
    top = link.top

    def left() -> Tensor:
        return asymmetric.decode(state["error"], state["error_lo"], state["error_hi"], d, torch.float64)

    for t, row in enumerate(grads):
        assert row[0] is not None
        came = left() + row[0].flatten()
        play(opt, params, [row])
        kept = torch.zeros(d, dtype=torch.float64)
        kept[top.where(state["places"][t % 4], d)] = state["values"][t % 4]
        unit = ((state["error_hi"].double() - state["error_lo"].double()) / 15).repeat_interleave(64)[:d]
        assert bool(((kept + left() - came).abs() <= unit / 2 + 1e-12).all())
        assert int((kept != 0).sum()) == top.kept(d)


def test_only_what_the_window_holds_moves_and_with_alpha_everything() -> None:
    start, grads = draw([(40, 50)], 4, dtype=torch.float32)
    for alpha in (0.0, 0.1):
        params = leaves(start)
        opt = micro(params, window=2, alpha=alpha)
        before = play(opt, params, grads[:3])[0]
        moved = float((play(opt, params, grads[3:])[0] != before).float().mean())
        assert moved <= 2 * math.ceil(0.01 * 2000) / 2000 if alpha == 0 else moved > 0.9


def test_state_takes_less_than_a_byte_an_element() -> None:
    d = 64 * 4096
    opt = micro(leaves([torch.zeros(64, 4096)]), lr=1e-3)
    assert opt.state_bytes() <= 0.5 * d + 4 * 10 * math.ceil(0.01 * 4096) * 64 + 4 * d / 64
    assert opt.state_bytes() / d < 0.97


def test_betas_and_eps_of_a_group_take_effect() -> None:
    start, grads = draw([(16, 8)], 3)
    built, told = leaves(start), leaves(start)
    changed = {"betas": (0.5, 0.7), "eps": 0.1, "alpha": 0.2}
    opt = micro(told, density=0.2)
    opt.param_groups[0].update(changed)
    assert distance(play(opt, told, grads), play(micro(built, density=0.2, **changed), built, grads)) < 1e-15


@pytest.mark.parametrize(
    "wrong",
    [
        {"window": 0},
        {"density": 0.0},
        {"block": 40000},
        {"quant_block": 7},
        {"alpha": 1.0},
        {"value_dtype": torch.float16},
        {"alpha": 0.1, "error_feedback": False},
    ],
)
def test_bad_settings_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MicroAdam(leaves([torch.zeros(3)]), **wrong)
