"""The plan: what each parameter gets and why, before anything is done."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance.problems import draw, leaves, play, same
from optim.toys import apply, gain, heavy, numbers, optimizer, zeros
from torch import nn

from poise.optim import Muon, Optimizer, Route, by_role, chain, everything
from poise.optim.transforms.sign import sign


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 50))


def planned(**options: Any) -> Optimizer:
    routes = [
        Route("heavy", chain(heavy(), gain(3.0)), by_role("matrix"), {"lr": 0.5}),
        Route("sign", sign(), everything),
    ]
    return optimizer(model(), routes, **{"lr": 0.1, **options})


def test_every_parameter_has_one_line_with_its_rule_and_why() -> None:
    lines = {line.name: line for line in planned().plan()}
    assert list(lines) == ["1.weight", "0.weight", "1.bias", "2.weight", "2.bias", "3.weight", "3.bias"]
    assert {name: line.rule for name, line in lines.items()} == {
        name: "heavy" if name == "1.weight" else "sign" for name in lines
    }
    matrix, table = lines["1.weight"], lines["0.weight"]
    assert (matrix.shape, matrix.role, matrix.lr) == ((64, 64), "matrix", 0.5)
    assert (table.shape, table.role, table.lr) == ((50, 64), "embedding", 0.1)
    assert "matrix" in matrix.why
    assert all(line.why for line in lines.values())


def test_state_formats_and_bytes_are_shown() -> None:
    lines = {line.name: line for line in planned(state="int8").plan()}
    assert (lines["2.weight"].state, lines["2.weight"].state_bytes) == ("none", 0)
    plain = {line.name: line for line in planned().plan()}
    assert (plain["1.weight"].state, plain["1.weight"].state_bytes) == ("float32", 4 * 64 * 64)
    assert "int8" in lines["1.weight"].state
    assert 64 * 64 <= lines["1.weight"].state_bytes < 1.2 * 64 * 64
    opt = planned(state="int8")
    assert sum(line.state_bytes for line in opt.plan()) == opt.state_bytes()


def test_the_rms_is_that_of_the_step_that_would_be_taken() -> None:
    params = zeros((2,), (2,), (3,))
    opt = optimizer(params, chain(heavy(), gain(2.0)), lr=0.1)
    play(opt, params[:1], [[numbers(1.0, 1.0)]])
    plan = opt.plan([numbers(3.0, 4.0), numbers(0.0, 1.0), None])  # pyright: ignore[reportArgumentType]
    found = [line.update_rms for line in plan]
    assert found == pytest.approx([0.1 * 2 * ((3.5**2 + 4.5**2) / 2) ** 0.5, 0.1 * 2 * 0.5**0.5, 0.0])
    assert plan.previewed_on == "the given gradients"


def test_without_gradients_the_plan_is_made_on_standard_normal_ones() -> None:
    plan = optimizer(zeros((200, 100)), apply(), lr=0.5).plan()
    assert plan.previewed_on == "standard normal gradients"
    assert [line.update_rms for line in plan] == pytest.approx([0.5], rel=0.02)


def test_gradients_that_stand_in_the_parameters_are_used() -> None:
    params = zeros((2,))
    params[0].grad = numbers(3.0, 3.0)
    plan = optimizer(params, apply(), lr=0.5).plan()
    assert plan.previewed_on == "the current gradients"
    assert [line.update_rms for line in plan] == [1.5]


def test_printed_it_is_a_table_with_the_totals_below() -> None:
    opt = planned()
    text = str(opt.plan())
    head, rule, *rows, foot = text.split("\n")
    for title in ("parameter", "shape", "role", "rule", "why", "lr", "state", "bytes", "update RMS"):
        assert title in head
    assert set(rule) == {"-", " "}
    assert len(rows) == 7
    (row,) = [row for row in rows if row.startswith("1.weight")]
    for cell in ("64x64", "matrix", "heavy", "0.5", "float32", "16,384"):
        assert cell in row.split() or cell in row
    total = sum(p.numel() for p in model().parameters())
    assert f"{total:,} parameters" in foot and f"{opt.state_bytes():,} bytes" in foot
    assert "standard normal gradients" in foot


def test_planning_changes_nothing() -> None:
    start, grads = draw([(64, 128), (5,)], 4, dtype=torch.bfloat16)
    params, twin = leaves(start), leaves(start)
    opt = Muon(params, state="int8", backend="eager")
    play(opt, params, grads[:2])
    str(opt.plan())
    clean = Muon(twin, state="int8", backend="eager")
    assert same(play(opt, params, grads[2:]), play(clean, twin, grads))


def test_a_plan_can_be_made_where_a_rule_must_be_fed() -> None:
    """It is looked at before training, when there is nothing to feed yet."""
    params = zeros((4,))
    opt = optimizer(params, apply(lambda u, state, x, k: u + k.target, feeds=("target",)), lr=0.5)
    assert len(opt.plan()) == 1


def test_a_parameter_without_elements_has_its_line() -> None:
    plan = optimizer(zeros((0, 3), (2,)), heavy(), lr=0.5).plan()
    assert plan.lines[0].update_rms == 0.0
    assert [line.shape for line in plan] == [(0, 3), (2,)]
