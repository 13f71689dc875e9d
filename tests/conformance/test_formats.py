"""State in few bits: as small as it says, as close to float32 as it says, and training goes on."""

from __future__ import annotations

import pytest
import torch

from poise.catalog import Method

from .cases import batch, build, loss_of, net, pace, tensors_of
from .problems import draw, leaves, play, same

# Bytes of state against float32, scales included, and distance from the float32 run after 20 steps against its length.
SMALLER = {"bf16": 0.51, "int8": 0.29, "int4": 0.17}
NEAR = {"bf16": 0.02, "int8": 0.05, "int4": 0.3}


@pytest.mark.parametrize("state", SMALLER)
def test_the_state_of_a_large_matrix_takes_the_bytes_it_should(entry: Method, state: str) -> None:
    def size(state: str) -> int:
        tensors = tensors_of(build(entry, leaves([torch.zeros(64, 256)]), state=state))
        return sum(t.nbytes for t in tensors.values() if t.numel() > 1)

    assert size(state) <= SMALLER[state] * size("fp32")


@pytest.mark.parametrize("state", SMALLER)
def test_the_state_of_small_tensors_stays_in_float32(entry: Method, state: str) -> None:
    start, grads = draw([(31, 128), (100,), (8, 4, 3, 3)], 4, dtype=torch.float32)
    exact, small = leaves(start), leaves(start)
    wanted = play(build(entry, exact, backend="eager"), exact, grads)
    assert same(play(build(entry, small, backend="eager", state=state), small, grads), wanted)


@pytest.mark.parametrize("state", NEAR)
def test_twenty_steps_stay_near_the_float32_run(entry: Method, state: str) -> None:
    start, noise = draw([(64, 128)], 20, dtype=torch.float32)
    pull = draw([(64, 128)], 0, seed=7, dtype=torch.float32)[0][0]
    grads = [[0.5 * pull + row[0] for row in [r] if row[0] is not None] for r in noise]
    ends = {}
    for kept in ("fp32", state):
        params = leaves(start)
        # one format compiled for each rule; that all of them are the same compiled is shown in tests/optim/engine
        opt = build(entry, params, state=kept, backend="auto" if state == "int8" else "eager")
        ends[kept] = play(opt, params, [list(row) for row in grads])[0]
    gap = (ends[state] - ends["fp32"]).norm() / (ends["fp32"] - start[0]).norm()
    assert gap < NEAR[state]


@pytest.mark.parametrize("state", NEAR)
def test_training_goes_on_as_with_float32(entry: Method, state: str) -> None:
    probe = net()
    loss_of(probe, batch()).backward()
    gradient = next(probe.parameters()).grad
    assert gradient is not None
    lr = pace(entry, 4e-3, gradient)
    losses = {}
    for kept in ("fp32", state):
        model = net()
        opt = build(entry, model, lr=lr, state=kept, backend="eager")
        for step in range(40):
            opt.zero_grad()
            loss_of(model, batch(seed=step)).backward()
            opt.step()
        with torch.no_grad():
            losses[kept] = float(loss_of(model, batch(512, seed=1000)))
    with torch.no_grad():
        first = float(loss_of(net(), batch(512, seed=1000)))
    assert losses["fp32"] < 0.85 * first
    assert first - losses[state] > 0.9 * (first - losses["fp32"])
