"""Second moments that are not kept entry by entry, and bias correction on its own."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from conformance.problems import Grads, distance, draw, leaves, play
from optim.toys import optimizer
from torch import Tensor

from poise.optim import chain
from poise.optim.transforms.adaptive import adam, debias, factored_adam, largest_ratio

BETAS = [(0.9, 0.999), (0.95, 0.95), (0.9, 0.5), (0.0, 0.9), (0.6, 0.36)]


def steps_of(rule: object, gradients: Sequence[Tensor]) -> list[Tensor]:
    """What each step of a rule adds to weights of zero at lr 1, negated."""
    params = leaves([torch.zeros_like(gradients[0])])
    opt = optimizer(params, rule, lr=1.0)
    steps = []
    for g in gradients:
        before = params[0].detach().clone()
        steps.append(before - play(opt, params, [[g]])[0])
    return steps


@pytest.mark.parametrize("betas", BETAS)
def test_the_least_second_moment_is_the_true_one_of_a_constant_gradient_and_never_more_than_it(
    betas: tuple[float, float],
) -> None:
    b1, b2 = betas
    generator = torch.Generator().manual_seed(0)
    for gradients in (torch.ones(12, 50).double(), torch.randn(12, 50, generator=generator, dtype=torch.float64)):
        m, v = torch.zeros(50).double(), torch.zeros(50).double()
        for t, g in enumerate(gradients, 1):
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            assert (m**2 / largest_ratio(b1, b2, t) <= v * (1 + 1e-12)).all()


@pytest.mark.parametrize("t", [1, 2, 7])
def test_some_gradients_reach_the_bound(t: int) -> None:
    """Those that stand to each other as the two averages' weights do."""
    b1, b2 = 0.9, 0.99
    m = v = 0.0
    for s in reversed(range(t)):
        g = (b1 / b2) ** s
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    assert m * m / v == pytest.approx(largest_ratio(b1, b2, t), rel=1e-12)


def test_a_second_moment_that_forgets_faster_than_the_first_has_no_bound_in_the_long_run() -> None:
    assert largest_ratio(0.99, 0.5, 100_000) == float("inf")
    assert largest_ratio(0.9, 0.0, 2) == float("inf")
    assert steps_of(factored_adam((0.9, 0.0)), draw([(3, 2)], 0)[0] * 3)[-1].isfinite().all()


def test_squares_of_rank_one_need_no_more_than_their_rows_and_columns() -> None:
    rows, columns = (draw([(n,)], 0, seed=n)[0][0].abs() + 0.1 for n in (8, 6))
    signs = draw([(8, 6)], 5)[1]
    gradients = [torch.outer(rows, columns) * torch.sign(g) for row in signs for g in row if g is not None]
    found = steps_of(factored_adam((0.9, 0.99), 1e-3), gradients)
    assert distance(found, steps_of(adam((0.9, 0.99), 1e-3, correct_bias=False), gradients)) < 1e-13


@pytest.mark.parametrize("beta", [0.95, 0.5])
def test_a_constant_diagonal_gradient_moves_as_under_adam_where_both_averages_are_alike(beta: float) -> None:
    gradients = [torch.diag(torch.tensor([1.0, 0.1, 0.01]).double())] * 6
    found = steps_of(factored_adam((beta, beta), 1e-300), gradients)
    assert distance(found, steps_of(adam((beta, beta), 1e-300, correct_bias=False), gradients)) < 1e-12


@pytest.mark.parametrize("betas", BETAS)
def test_no_entry_moves_further_than_adam_could_move_it(betas: tuple[float, float]) -> None:
    gradients = [torch.diag(torch.logspace(0, -6, 20, dtype=torch.float64))] * 6
    for t, step in enumerate(steps_of(factored_adam(betas, 1e-300), gradients), 1):
        assert float(step.abs().max()) <= largest_ratio(*betas, t) ** 0.5 * (1 + 1e-12)


@pytest.mark.parametrize("size", [1e-15, 1.0, 1e15])
def test_the_size_of_float32_gradients_makes_no_difference(size: float) -> None:
    gradients = [g for row in draw([(8, 6)], 4, dtype=torch.float32)[1] for g in row if g is not None]
    wanted = steps_of(factored_adam(eps=0.0), gradients)
    assert distance(steps_of(factored_adam(eps=0.0), [size * g for g in gradients]), wanted) < 1e-4


def test_a_row_without_gradient_stays_where_it_is() -> None:
    gradients = [torch.cat([torch.zeros(1, 4), torch.ones(3, 4)])] * 3
    assert all(torch.equal(step[0], torch.zeros(4)) and step[1:].all() for step in steps_of(factored_adam(), gradients))
    assert not any(step.any() for step in steps_of(factored_adam(), [torch.zeros(3, 4)] * 3))


def test_bias_correction_as_a_link_is_adams_own_where_eps_is_zero() -> None:
    start, grads = draw([(8, 6)], 10)
    one, two = leaves(start), leaves(start)
    wanted = play(optimizer(one, adam((0.9, 0.99), 0.0), lr=0.1), one, grads)
    rule = chain(adam((0.9, 0.99), 0.0, correct_bias=False), debias((0.9, 0.99)))
    assert distance(play(optimizer(two, rule, lr=0.1), two, grads), wanted) < 1e-13


def test_calls_that_only_gathered_are_not_counted() -> None:
    ones: Grads = [[torch.ones(3).double()]]
    params = leaves([torch.zeros(3).double()])
    opt = optimizer(params, debias((0.9, 0.99), gathered=1), lr=1.0)
    first, second, third = (play(opt, params, ones)[0][0].item() for _ in range(3))
    assert first == pytest.approx(-1.0)
    assert second - first == pytest.approx(-1.0)
    assert third - second == pytest.approx(-((1 - 0.99**2) ** 0.5) / (1 - 0.9**2))
