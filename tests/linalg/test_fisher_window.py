"""The inverse of an empirical Fisher matrix from m gradients, against the dense one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from poise.linalg.fisher_window import FisherWindow
from poise.linalg.woodbury import damped_solve, row_weights


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(G: Tensor, lam: float, block: int | None = None) -> Tensor:
    """F^(-1), with what lies across blocks set to zero before."""
    F = lam * torch.eye(G.shape[1], dtype=G.dtype) + G.mT @ G / len(G)
    place = torch.arange(G.shape[1]) // (block or G.shape[1])
    return torch.linalg.inv(F * (place[:, None] == place))


def gap(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max())


@pytest.mark.parametrize("block", [None, 1, 7, 20, 60, 100])
def test_products_and_diagonal_are_those_of_the_dense_inverse(block: int | None) -> None:
    G, x = draw(16, 60), draw(3, 60, seed=1)
    F, wanted = FisherWindow(G, 0.01, block), dense(G, 0.01, block)
    assert gap(F.solve(x), x @ wanted) < 1e-10
    assert gap(F.solve(x[1]), wanted @ x[1]) < 1e-10
    assert gap(F.diagonal(), wanted.diagonal()) < 1e-10


def test_the_recursion_the_products_alone_and_the_weights_of_a_row_agree() -> None:
    G, x = draw(16, 60), draw(60, seed=1)
    F = FisherWindow(G, 0.01)
    assert gap(F.solve(x), damped_solve(G, x, 0.01, 1 / 16)) < 1e-10
    assert gap(F.solve(G[5]), G.mT @ row_weights(G @ G.mT, 5, 0.01, 1 / 16)) < 1e-10


def test_the_order_of_the_gradients_makes_no_difference() -> None:
    G, x = draw(16, 60), draw(60, seed=1)
    turned = G[torch.arange(15, -1, -1)].roll(4, 0)
    assert gap(FisherWindow(turned, 0.01).solve(x), FisherWindow(G, 0.01).solve(x)) < 1e-10


def test_the_gradients_are_not_written_into() -> None:
    G = draw(4, 9)
    before = G.clone()
    for block in (None, 3):
        FisherWindow(G, 0.1, block).solve(draw(9))
    assert torch.equal(G, before)


def test_bad_input_is_named() -> None:
    G = draw(4, 9)
    with pytest.raises(ValueError, match="G: "):
        FisherWindow(G[:0])
    with pytest.raises(ValueError, match="lam=0"):
        FisherWindow(G, 0.0)
    with pytest.raises(ValueError, match="block=0"):
        FisherWindow(G, 0.1, 0)
    with pytest.raises(ValueError, match="x: "):
        FisherWindow(G, 0.1).solve(draw(8))
