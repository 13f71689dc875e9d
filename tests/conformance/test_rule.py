"""The mathematics: every entry is its published formula, however it is run and whatever the weights are kept in."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from poise.catalog import Method
from poise.optim.engine import kernels

from .cases import build, compare_with_reference, entries, grads_like, kept_for, mutated, pace, tensors_of, told, tolerance
from .problems import SHAPES, distance, draw, leaves, play, same


def test_it_equals_its_float64_reference(entry: Method) -> None:
    for hyper in told(entry, "CASES", [{}]):
        gap = compare_with_reference(entry, hyper)
        assert gap < tolerance(entry), f"{entry.name}({hyper}) is {gap:.3g} away from its reference"


def test_its_reference_tells_it_from_its_mutant(entry: Method) -> None:
    """A reference that a wrong rule equals too proves nothing."""
    wrong = mutated(entry)
    gaps = [compare_with_reference(entry, hyper, wrong) for hyper in told(entry, "CASES", [{}])]
    assert max(gaps) > 1e3 * tolerance(entry), f"{entry.name} with {entry.mutant} equals its reference too: {gaps}"


@pytest.mark.usefixtures("float32_products")
@pytest.mark.parametrize("backend", ["tiles", "chunks", "auto"])
def test_every_backend_does_the_same_mathematics(entry: Method, backend: str) -> None:
    start, grads = draw(steps=5, dtype=torch.float32, missing=[(1, 0), (2, 3)])
    eager, other = leaves(start), leaves(start)
    wanted = play(build(entry, eager, backend="eager"), eager, grads)
    assert distance(play(build(entry, other, backend=backend), other, grads), wanted) < 1e-6


def test_a_schedule_never_compiles_again(entry: Method) -> None:
    start, grads = draw(steps=6, dtype=torch.float32)
    params = leaves(start)
    opt = build(entry, params)
    play(opt, params, grads[:2])
    before = kernels.compiled_count()
    play(opt, params, grads[2:], [0.9, 0.7, 0.5, 0.1])
    for group in opt.param_groups:
        group["lr"] = torch.tensor(group["lr"])
        if "weight_decay" in group:
            group["weight_decay"] = 0.123
    play(opt, params, grads[:1])
    assert kernels.compiled_count() == before


def test_bfloat16_weights_move_on_average_as_their_float32_twins(entry: Method) -> None:
    """Steps of 2e-5 on weights of 1.0, whose neighbours are 4e-3 away: to nearest, none of them would ever move."""
    steps = 50
    generator = torch.Generator().manual_seed(0)
    drift = torch.randn(64, 128, generator=generator).sign()
    grads = [[drift + 0.3 * torch.randn(64, 128, generator=generator)] for _ in range(steps)]
    ones = [torch.ones(64, 128)]
    lr = pace(entry, 2e-5, drift)
    ends = {}
    for name, dtype, weights in (
        ("twin", torch.float32, "auto"),
        ("auto", torch.bfloat16, "auto"),
        ("nearest", torch.bfloat16, "nearest"),
    ):
        params = leaves(ones, dtype)
        # what all take by default is compiled; that any rounding is the same compiled is shown in tests/optim/test_weights.py
        backend = "eager" if weights == "nearest" else "auto"
        opt = build(entry, params, lr=lr, weights=weights, weight_decay=0.0, backend=backend)
        ends[name] = play(opt, params, [list(row) for row in grads])[0].double() - 1.0
    assert torch.equal(ends["nearest"], torch.zeros(64, 128, dtype=torch.float64))
    share = float((ends["auto"] * ends["twin"]).sum() / ends["twin"].pow(2).sum())
    assert share == pytest.approx(1.0, abs=0.1)
    # steps that are rounded independently spread by sqrt(distance * spacing); the same noise in every step, by 7 times that
    noise = ends["auto"] - share * ends["twin"]
    assert float(noise.std()) < 1.5 * float(ends["twin"].abs().mean() * 2**-7) ** 0.5


def test_split_weights_are_those_of_a_float32_run_rounded(entry: Method) -> None:
    start, grads = draw(SHAPES[:2], 12, dtype=torch.bfloat16)
    split, twin = leaves(start), leaves(start, torch.float32)
    found = play(build(entry, split, weights="split", backend="eager"), split, grads)
    wanted = [p.bfloat16() for p in play(build(entry, twin, backend="eager"), twin, grads)]
    for a, b in zip(found, wanted, strict=True):
        assert float((a != b).float().mean()) < 1e-3  # halves are rounded up, and to even
    assert distance(found, wanted) < 2**-6


def test_rounding_noise_depends_on_the_seed_and_on_nothing_else(entry: Method) -> None:
    start, grads = draw(steps=3, dtype=torch.bfloat16)
    ends = []
    for seed in (0, 0, 1):
        params = leaves(start)
        torch.manual_seed(len(ends))  # the global generator must not matter, nor be used up
        state = torch.get_rng_state()
        ends.append(play(build(entry, params, seed=seed), params, grads))
        assert torch.equal(torch.get_rng_state(), state)
    assert same(ends[0], ends[1])
    assert not same(ends[0], ends[2])


def test_without_any_gradient_a_step_changes_nothing(entry: Method) -> None:
    start, grads = draw(steps=2, dtype=torch.float32)
    params = leaves(start)
    opt = build(entry, params)
    play(opt, params, grads)
    weights, state = [p.detach().clone() for p in params], tensors_of(opt)
    opt.zero_grad()
    opt.step()
    assert same(params, weights)
    assert same(list(tensors_of(opt).values()), list(state.values()))


def test_a_parameter_without_gradient_is_neither_moved_nor_decayed(entry: Method) -> None:
    start, grads = draw(steps=4, dtype=torch.float32, missing=[(2, 0), (2, 2)])
    params = leaves(start)
    opt = build(entry, params, weight_decay=0.5)
    before = play(opt, params, grads[:2])
    state = {index: kept_for(opt, params[index]) for index in (0, 2)}
    after = play(opt, params, grads[2:3])
    for index in (0, 2):
        assert same([after[index]], [before[index]])
        assert same(list(kept_for(opt, params[index]).values()), list(state[index].values()))
    assert not torch.equal(after[1], before[1])


def test_gradients_are_left_as_they_came(entry: Method) -> None:
    params = leaves(draw(steps=0, dtype=torch.float32)[0])
    (row,) = grads_like(params, 1)
    opt = build(entry, params)
    play(opt, params, [row])
    assert same([p.grad for p in params if p.grad is not None], [g for g in row if g is not None])


def test_every_exemption_names_a_behaviour_and_says_why() -> None:
    files = Path(__file__).parent.glob("test_*.py")
    behaviours = {name for file in files for name in re.findall(r"def test_(\w+)\(", file.read_text())}
    for entry in entries():
        for behaviour, reason in entry.exempt.items():
            assert behaviour in behaviours, f"{entry.name} is exempt from {behaviour!r}, which no test is called"
            assert len(reason) > 20, f"{entry.name} is exempt from {behaviour!r} without a reason: {reason!r}"
