"""Projections onto subspaces of matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from poise.linalg.projectors import Projector

SHAPES = [(8, 5), (5, 8), (6, 6), (1, 7), (7, 1)]
ORTHOGONAL = ["svd", "randomized", "random", "permuted", "rows", "columns", "entries"]


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


@pytest.mark.parametrize("kind", ["randomized", "random", "gaussian", "permuted", "rows", "columns", "entries"])
def test_batches_are_projected_one_by_one(kind: Any) -> None:
    p, G, u = Projector(kind, 2), draw(3, 4, 6, 5), uniform(3, 4, 60)
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


@pytest.mark.parametrize("kind", ["svd", "randomized", "random"])
@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_both_sides_are_projected_one_after_the_other(kind: Any, shape: tuple[int, int]) -> None:
    p, G = Projector(kind, 3, "both"), draw(*shape)
    basis = p.basis(G, uniform(p.draws(*shape)))
    A, B = basis.split(list(shape), -1)
    assert p.small_shape(*shape) == (3, 3) and tuple(basis.shape) == p.basis_shape(*shape) == (3, 15)
    for one in (A, B):
        torch.testing.assert_close(one @ one.T, torch.eye(3, dtype=G.dtype), atol=1e-12, rtol=0)
    torch.testing.assert_close(p.project(G, basis), A @ G @ B.T, atol=1e-12, rtol=0)
    torch.testing.assert_close(there_and_back(p, G, basis), A.T @ A @ G @ B.T @ B, atol=1e-12, rtol=0)
    if kind == "svd":
        U, s, Vh = torch.linalg.svd(G, full_matrices=False)
        torch.testing.assert_close(there_and_back(p, G, basis), U[:, :3] @ torch.diag(s[:3]) @ Vh[:3], atol=1e-12, rtol=0)
    new = p.basis(draw(*shape, seed=3), uniform(p.draws(*shape), seed=4))
    small, inside = draw(3, 3, seed=5), p.back(draw(3, 3, seed=5), basis, *shape)
    torch.testing.assert_close(p.carry(small, basis, new, *shape), p.project(inside, new), atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape, side", [((12, 40), "left"), ((40, 12), "right"), ((40, 12), "both")])
def test_a_sketch_finds_the_leading_vectors_of_a_matrix_that_is_nearly_of_their_rank(shape: tuple[int, int], side: Any) -> None:
    G = draw(shape[0], 3) @ draw(3, shape[1], seed=1) + 1e-3 * draw(*shape, seed=2)
    exact, sketched = Projector("svd", 3, side), Projector("randomized", 3, side)
    error = (G - there_and_back(exact, G, exact.basis(G))).norm()
    found = (G - there_and_back(sketched, G, sketched.basis(G, uniform(sketched.draws(*shape))))).norm()
    assert float(found / error) < 1 + 1e-6


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_singular_vectors_are_turned_towards_those_before_them(side: Any) -> None:
    p, G = Projector("svd", 3, side), draw(6, 5)
    old = p.basis(G)
    flips = torch.tensor([[1.0], [-1.0], [-1.0]]).double()
    torch.testing.assert_close(p.aligned(flips * old, old, 6, 5), old)


def test_state_of_several_matrices_of_one_subspace_is_carried_over_together() -> None:
    p, G = Projector("columns", 2), draw(4, 3, 5)
    old, new = (p.basis(G, uniform(4, 5, seed=seed)) for seed in (0, 1))
    many = draw(7, 4, 3, 2)
    torch.testing.assert_close(p.carry(many, old, new, 3, 5)[6], p.carry(many[6], old, new, 3, 5))


def test_places_that_stay_chosen_keep_their_state() -> None:
    p = Projector("columns", 2)
    small = draw(3, 2)
    moved = p.carry(small, torch.tensor([1, 3]), torch.tensor([3, 4]), 3, 5)
    torch.testing.assert_close(moved, torch.stack([small[:, 1], torch.zeros(3, dtype=small.dtype)], 1))


def test_a_share_counts_what_there_is() -> None:
    assert Projector("columns", 0.25).size(10, 8) == 2
    assert Projector("entries", 0.25).size(10, 8) == 20
    assert Projector("rows", 0.01).size(10, 8) == 1
    assert Projector("rows", 0.25).size(11, 8) == 2  # never more than the share
    assert Projector("svd", 0.25).size(20, 11) == 3
    assert Projector("svd", 0.25, "both").size(20, 8) == 2
    assert Projector("svd", 100).size(10, 8) == 8
    assert Projector("svd", 100, "long").size(10, 8) == 8  # no more directions than the other side has


@pytest.mark.parametrize(
    "options", [{"side": "both", "kind": "rows"}, {"kind": "qr"}, {"rank": 0}, {"rank": 1.5}, {"rank": True}, {"side": "up"}]
)
def test_bad_settings_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Projector(**options)


@pytest.mark.parametrize("numbers", [None, uniform(3)])
def test_a_random_basis_needs_its_numbers(numbers: Tensor | None) -> None:
    with pytest.raises(ValueError, match="from 4 numbers"):
        Projector("rows", 2).basis(draw(4, 5), numbers)
