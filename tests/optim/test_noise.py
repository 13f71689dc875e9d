"""`k.uniform()`: random numbers that belong to an element, not to how or where it is worked on."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from conformance.problems import play, same
from optim.toys import apply, apply_matrix, apply_tensor, gain, numbers, optimizer, zeros
from torch import Tensor

from poise.optim import Context, Optimizer, Transform, chain
from poise.optim.engine import tiles
from poise.optim.transform import State


class dice(Transform):
    """`u <- u + uniform`; twice in one update."""

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return u + k.uniform() + 0 * k.uniform()


def _second(u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
    k.uniform()
    return k.uniform()


first = apply(lambda u, state, x, k: k.uniform())
second = apply(_second)


def drawn(rule: Any = first, size: int = 20_000, names: str = "w", steps: int = 1, **options: Any) -> list[Tensor]:
    """The numbers of the last of `steps` steps, for each of the named parameters."""
    params = zeros(*[(size,)] * len(names))
    opt = optimizer(list(zip(names, params, strict=True)), rule, lr=1.0, **options)
    play(opt, params, [[torch.zeros(size, dtype=torch.float64)] * len(names)] * (steps - 1))
    before = [p.detach().clone() for p in params]
    after = play(opt, params, [[torch.zeros(size, dtype=torch.float64)] * len(names)])
    return [b - a for a, b in zip(after, before, strict=True)]


def test_they_lie_between_zero_and_one_and_are_spread_evenly() -> None:
    (u,) = drawn(size=200_000)
    assert u.min() >= 0 and u.max() < 1
    assert abs(float(u.mean()) - 1 / 2) < 4 * math.sqrt(1 / 12 / 200_000)
    assert abs(float(u.var()) - 1 / 12) < 0.002
    counts = torch.histc(u, 100, 0, 1)
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 99 + 5 * math.sqrt(2 * 99)  # chi-squared


@pytest.mark.parametrize("lag", [1, 2, 3, 64, 128, 8192])
def test_neighbours_are_independent(lag: int) -> None:
    (u,) = drawn(size=100_000)
    assert abs(correlation(u[:-lag], u[lag:])) < 5 / math.sqrt(100_000)


def test_two_calls_steps_parameters_and_seeds_draw_independent_numbers() -> None:
    (one,) = drawn()
    others = {
        "the second call of one update": drawn(second)[0],
        "the next step": drawn(steps=2)[0],
        "another parameter": drawn(names="v")[0],
        "another seed": drawn(seed=1)[0],
        "another link": drawn(chain(gain(), first))[0],
    }
    for what, numbers_drawn in others.items():
        assert abs(correlation(one, numbers_drawn)) < 5 / math.sqrt(20_000), what
        assert float((one == numbers_drawn).double().mean()) < 0.01, what


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def test_the_same_parameter_step_and_seed_draw_the_same_numbers_whatever_else_is_trained() -> None:
    (alone,) = drawn()
    assert same([alone], [drawn(names="vw")[1]])
    assert same([alone], [drawn(names="wv")[0]])


def test_an_element_keeps_its_number_when_the_tensor_grows() -> None:
    assert torch.equal(drawn(size=100)[0], drawn(size=20_000)[0][:100])


def test_nothing_is_taken_from_torchs_generator() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a = drawn()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert same(a, drawn())


@pytest.mark.parametrize("kind", [apply_matrix, apply_tensor])
def test_rules_of_whole_tensors_draw_in_their_shape(kind: type[apply]) -> None:
    params = zeros((6, 2, 3), (6, 2, 3), (6, 6))
    opt = optimizer(params, kind(lambda u, state, x, k: k.uniform()), lr=1.0)
    a, b, c = (-w for w in play(opt, params, [[torch.zeros_like(p) for p in params]]))
    assert len(torch.unique(torch.cat([a.reshape(-1), b.reshape(-1), c.reshape(-1)]))) == 108


def test_a_matrix_draws_in_a_batch_of_equal_ones_as_it_does_alone() -> None:
    rule = apply_matrix(lambda u, state, x, k: k.uniform())
    params, single = zeros((5, 4), (5, 4), (5, 4)), zeros((5, 4))
    zero = torch.zeros(5, 4, dtype=torch.float64)
    found = play(optimizer(list(zip("abc", params, strict=True)), rule, lr=1.0), params, [[zero] * 3])
    assert same(play(optimizer([("b", single[0])], rule, lr=1.0), single, [[zero]]), [found[1]])


def test_a_resumed_run_draws_on() -> None:
    params, fresh = zeros((50,)), zeros((50,))
    zero: list[Tensor | None] = [torch.zeros(50, dtype=torch.float64)]
    opt, again = optimizer(params, dice(), lr=1.0, seed=3), optimizer(fresh, dice(), lr=1.0, seed=3)
    halfway = play(opt, params, [zero, zero])
    saved = copy.deepcopy(opt.state_dict())
    wanted = play(opt, params, [zero])
    again.load_state_dict(saved)
    fresh[0].data.copy_(halfway[0])
    assert same(play(again, fresh, [zero]), wanted)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE", 1000)


def moved(shapes: list[tuple[int, ...]], backend: Any) -> list[Tensor]:
    params = zeros(*shapes, dtype=torch.float32)
    opt = Optimizer(params, dice(), lr=1.0, backend=backend)
    return play(opt, params, [[torch.full(shape, 0.25) for shape in shapes]] * 2)


SHAPES = [(70_000,), (3, 7), (2, 3, 1000)]


@pytest.mark.parametrize("backend", ["chunks", "tiles"])
def test_every_backend_draws_the_same_numbers(backend: str) -> None:
    assert same(moved(SHAPES, backend), moved(SHAPES, "eager"))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("threads", [1, 2])
def test_the_size_of_tiles_and_the_number_of_threads_change_no_number(threads: int) -> None:
    """71 tiles of 1000 here, against one of 65536 and a rest."""
    held = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = moved(SHAPES, "tiles")
    finally:
        torch.set_num_threads(held)
    assert same(found, moved(SHAPES, "eager"))


def test_no_noise_without_elements_to_have_it() -> None:
    params = zeros((0,), (2,))
    opt = optimizer(params, first, lr=1.0)
    found = play(opt, params, [[numbers(), numbers(0.0, 0.0)]])
    assert found[0].shape == (0,)
    assert bool((found[1] != 0).all())
