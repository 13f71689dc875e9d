"""Routing: a choice of few among several, how evenly it falls, and a loss that is added in the backward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from poise.adapt.routing import Route, beside, imbalance, route


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 5, 6), (2, 3, 5, 6), (0, 6)])
def test_the_largest_probabilities_are_kept_and_divided_by_their_sum(shape: tuple[int, ...]) -> None:
    logits = drawn(*shape)
    found = route(logits, 2)
    kept = torch.where(found.probabilities >= found.probabilities.sort(-1).values[..., -2:-1], found.probabilities, 0.0)
    torch.testing.assert_close(found.weights, kept / kept.sum(-1, keepdim=True), rtol=1e-14, atol=1e-16)
    assert found.chosen.shape == (*shape[:-1], 2)
    assert torch.equal(found.weights.gather(-1, found.chosen) > 0, torch.ones_like(found.chosen, dtype=torch.bool))


def test_all_kept_is_the_softmax() -> None:
    found = route(drawn(5, 6), 6)
    torch.testing.assert_close(found.weights, found.probabilities, rtol=1e-14, atol=0)


def test_weights_are_numbers_where_the_kept_probabilities_are_none() -> None:
    assert route(torch.tensor([[-torch.inf, 3.0, -torch.inf]]), 2).weights.tolist() == [[0.0, 1.0, 0.0]]


def test_uniform_routing_has_the_balance_loss_k() -> None:
    n, k = 6, 2
    uniform = torch.full((n, n), 1 / n, dtype=torch.float64)
    turns = torch.stack([(torch.arange(k) + i) % n for i in range(n)])
    assert float(imbalance(Route(uniform, turns, uniform))) == pytest.approx(k, abs=1e-14)


def test_routing_all_to_the_same_has_the_largest_balance_loss() -> None:
    one = torch.zeros(7, 6, dtype=torch.float64).index_fill(1, torch.tensor([3]), 1.0)
    chosen = torch.full((7, 1), 3)
    assert float(imbalance(Route(one, chosen, one))) == 6.0


def test_no_tokens_have_no_balance_loss() -> None:
    assert float(imbalance(route(drawn(0, 6), 2))) == 0.0


def test_the_balance_loss_is_that_of_counting_token_by_token() -> None:
    found = route(drawn(3, 5, 6), 2)
    p, chosen = found.probabilities.reshape(-1, 6), found.chosen.reshape(-1, 2).tolist()
    wanted = sum(6 * sum(i in c for c in chosen) / 15 * float(p[:, i].mean()) for i in range(6))
    assert float(imbalance(found)) == pytest.approx(wanted, rel=1e-13)


@pytest.mark.parametrize("weight", [0.0, 1e-3, 2.0])
def test_gradients_are_those_of_the_sum_of_both_losses(weight: float) -> None:
    def gradients(added: bool) -> tuple[Tensor, ...]:
        x, logits = drawn(5, 6).requires_grad_(), drawn(5, 6).mul(2).requires_grad_()
        found = route(logits, 2)
        y, loss = found.weights * x, imbalance(found)
        if not added:
            return torch.autograd.grad(y.square().sum() + weight * loss, (x, logits))
        return torch.autograd.grad(beside(y, loss, weight).square().sum(), (x, logits))

    for a, b in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)
