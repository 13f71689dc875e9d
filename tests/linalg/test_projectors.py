"""Projections onto subspaces of matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from poise.linalg.projectors import Projector

SHAPES = [(8, 5), (5, 8), (6, 6), (1, 7), (7, 1)]
ORTHOGONAL = ["svd", "random", "rows", "columns", "entries"]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def there_and_back(p: Projector, G: Tensor, basis: Tensor) -> Tensor:
    return p.back(p.project(G, basis), basis, *G.shape[-2:])


@pytest.mark.parametrize("kind", ORTHOGONAL)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 0.5, 1.0, 100])
def test_there_and_back_is_an_orthogonal_projection(kind: Any, shape: tuple[int, int], rank: float) -> None:
    p, G = Projector(kind, rank), draw(*shape)
    basis = p.basis(G, uniform(p.draws(*shape)))
    assert tuple(basis.shape) == p.basis_shape(*shape)
    small = p.project(G, basis)
    assert tuple(small.shape) == p.small_shape(*shape)
    kept = there_and_back(p, G, basis)
    torch.testing.assert_close(p.project(G - kept, basis), torch.zeros_like(small), atol=1e-12, rtol=0)
    torch.testing.assert_close(there_and_back(p, kept, basis), kept, atol=1e-12, rtol=0)
    if isinstance(rank, float) and rank == 1.0:
        torch.testing.assert_close(kept, G, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "shape, side, left",
    [
        ((8, 5), "short", False),
        ((5, 8), "short", True),
        ((6, 6), "short", False),
        ((8, 5), "long", True),
        ((8, 5), "left", True),
        ((5, 8), "right", False),
    ],
)
def test_the_side_that_becomes_shorter(shape: tuple[int, int], side: Any, left: bool) -> None:
    small = Projector("svd", 2, side).small_shape(*shape)
    assert small == ((2, shape[1]) if left else (shape[0], 2))


@pytest.mark.parametrize("shape", [(8, 5), (5, 8)])
def test_svd_gives_the_best_approximation_of_its_rank(shape: tuple[int, int]) -> None:
    p, G = Projector("svd", 3), draw(*shape)
    s = torch.linalg.svdvals(G)
    error = (G - there_and_back(p, G, p.basis(G))).norm()
    torch.testing.assert_close(error, s[3:].square().sum().sqrt())


def test_gaussian_gives_the_matrix_back_in_the_mean_with_the_variance_it_should() -> None:
    """`E ||G B^T B - G||^2 = ||G||^2 (side + 1) / r`."""
    p, G = Projector("gaussian", 4, "right"), draw(3, 10)
    batch = G.expand(20000, 3, 10)
    errors = there_and_back(p, batch, p.basis(batch, uniform(20000, p.draws(3, 10)))) - G
    assert float(errors.mean(0).norm() / G.norm()) < 0.03
    variance = errors.square().sum((-2, -1)).mean() / G.square().sum()
    torch.testing.assert_close(variance, torch.tensor(11 / 4).double(), rtol=0.03, atol=0)


@pytest.mark.parametrize("kind", ["random", "gaussian", "rows", "columns", "entries"])
def test_batches_are_projected_one_by_one(kind: Any) -> None:
    p, G, u = Projector(kind, 2), draw(3, 4, 6, 5), uniform(3, 4, 30)
    basis = p.basis(G, u)
    one = there_and_back(p, G[2, 1], p.basis(G[2, 1], u[2, 1]))
    torch.testing.assert_close(there_and_back(p, G, basis)[2, 1], one, atol=1e-12, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_state_that_is_carried_over_is_that_of_the_same_matrix(side: Any) -> None:
    p, G = Projector("random", 4, side), draw(6, 4) if side == "left" else draw(4, 6)
    old, new = p.basis(G, uniform(24)), p.basis(G, uniform(24, seed=5))
    inside = there_and_back(p, G, old)  # in the old subspace
    small = p.project(inside, old)
    torch.testing.assert_close(p.carry(small, old, new, *G.shape), p.project(inside, new), atol=1e-12, rtol=0)
    # of independent entries, second moments add up
    torch.testing.assert_close(p.carry(torch.ones_like(small), old, old, *G.shape, squared=True), torch.ones_like(small))


def test_places_that_stay_chosen_keep_their_state() -> None:
    p = Projector("columns", 2)
    small = draw(3, 2)
    moved = p.carry(small, torch.tensor([1, 3]), torch.tensor([3, 4]), 3, 5)
    torch.testing.assert_close(moved, torch.stack([small[:, 1], torch.zeros(3, dtype=small.dtype)], 1))


def test_a_share_counts_what_there_is() -> None:
    assert Projector("columns", 0.25).size(10, 8) == 2
    assert Projector("entries", 0.25).size(10, 8) == 20
    assert Projector("rows", 0.01).size(10, 8) == 1
    assert Projector("svd", 100).size(10, 8) == 8
    assert Projector("svd", 100, "long").size(10, 8) == 8  # no more directions than the other side has


@pytest.mark.parametrize("options", [{"kind": "qr"}, {"rank": 0}, {"rank": 1.5}, {"rank": True}, {"side": "up"}])
def test_bad_settings_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Projector(**options)


@pytest.mark.parametrize("numbers", [None, uniform(3)])
def test_a_random_basis_needs_its_numbers(numbers: Tensor | None) -> None:
    with pytest.raises(ValueError, match="from 4 numbers"):
        Projector("rows", 2).basis(draw(4, 5), numbers)
