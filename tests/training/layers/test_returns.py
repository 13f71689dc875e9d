"""Values as distributions, and rewards at one size (SimbaV2, arXiv 2502.15280)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from poise.training import RewardScaler, RunningMoments, expected_value, two_hot

F64 = torch.float64


def reference(value: float, low: float, high: float, bins: int) -> Tensor:
    """The share of each bin is 1 minus the distance in spacings, where that is positive."""
    spacing = (high - low) / (bins - 1)
    value = min(max(value, low), high)
    return torch.tensor([max(0.0, 1 - abs(value - (low + i * spacing)) / spacing) for i in range(bins)], dtype=F64)


@pytest.mark.parametrize("low, high, bins", [(-5.0, 5.0, 101), (0.0, 1.0, 2), (-3.0, 7.0, 6)])
def test_a_value_is_shared_by_the_two_bins_around_it(low: float, high: float, bins: int) -> None:
    values = torch.cat([torch.linspace(low - 1, high + 1, 57, dtype=F64), torch.tensor([low, high], dtype=F64)])
    found = two_hot(values, low, high, bins)
    assert torch.allclose(found, torch.stack([reference(float(v), low, high, bins) for v in values]), atol=1e-12)
    assert ((found > 0).sum(-1) <= 2).all()
    assert torch.allclose(found.sum(-1), torch.ones(len(values), dtype=F64), rtol=1e-14)


def test_the_mean_is_the_value_unless_it_is_clipped() -> None:
    values = 5 * (2 * torch.rand(3, 500, dtype=F64) - 1)
    assert float((expected_value(two_hot(values)) - values).abs().max()) < 1e-12
    outside = torch.tensor([-7.0, 9.0], dtype=F64)
    assert torch.allclose(expected_value(two_hot(outside)), torch.tensor([-5.0, 5.0], dtype=F64))


def test_a_distribution_is_projected_atom_by_atom() -> None:
    generator = torch.Generator().manual_seed(0)
    bins = torch.linspace(-5, 5, 101, dtype=F64)
    probabilities = torch.rand(4, 101, dtype=F64, generator=generator)
    probabilities /= probabilities.sum(1, keepdim=True)
    reward = torch.randn(4, 1, dtype=F64, generator=generator)
    atoms = reward + 0.5 * bins  # stays within the bins
    found = two_hot(atoms, weights=probabilities)
    wanted = torch.zeros(4, 101, dtype=F64)
    for b in range(4):
        for j in range(101):
            wanted[b] += probabilities[b, j] * reference(float(atoms[b, j]), -5.0, 5.0, 101)
    assert torch.allclose(found, wanted, atol=1e-12)
    assert torch.allclose(expected_value(found), (probabilities * atoms).sum(1), atol=1e-12)


def test_bins_that_make_no_sense_are_refused() -> None:
    for bad in ({"bins": 1}, {"low": 2.0, "high": 2.0}):
        with pytest.raises(ValueError, match="needs low < high and two bins"):
            two_hot(torch.ones(3), **bad)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="must have the shape of values"):
        two_hot(torch.ones(3), weights=torch.ones(4))


def test_moments_pool_everything_they_have_seen() -> None:
    moments = RunningMoments((3,))
    x = [2 + 3 * torch.randn(shape, dtype=F64) for shape in ((4, 3), (2, 5, 3), (3,))]
    for part in x:
        moments.update(part)
    pooled = torch.cat([part.reshape(-1, 3) for part in x])
    assert torch.allclose(moments.mean, pooled.mean(0), rtol=1e-3)
    assert torch.allclose(moments.var, pooled.var(0, correction=0), rtol=1e-3)
    start = torch.tensor(1e-4, dtype=F64)  # exactly: as if 1e-4 observations of mean 0 and variance 1 had been there before
    n, total = len(pooled), len(pooled) + start
    mean = pooled.sum(0) / total
    second = (pooled.square().sum(0) + start) / total
    assert torch.allclose(moments.mean, mean, rtol=1e-12) and torch.allclose(moments.var, second - mean**2, rtol=1e-10)
    assert float(moments.count) == pytest.approx(n + 1e-4, rel=1e-15)
    assert torch.allclose(moments(pooled), (pooled - moments.mean) / (moments.var + 1e-8).sqrt())
    with pytest.raises(ValueError, match=r"last dimensions must be \(3,\)"):
        moments.update(torch.ones(4, 2))


def test_rewards_are_divided_by_the_spread_of_returns_or_their_largest() -> None:
    scaler, gamma = RewardScaler(environments=2, gamma=0.9, bound=5.0), 0.9
    generator = torch.Generator().manual_seed(0)
    G, r, seen, largest = torch.zeros(2, dtype=F64), torch.zeros(2, dtype=F64), [], 0.0
    for _ in range(50):
        r = torch.randn(2, dtype=F64, generator=generator)
        done = torch.rand(2, generator=generator) < 0.1
        G = torch.tensor([r[e] + (0.0 if done[e] else gamma * G[e]) for e in range(2)], dtype=F64)
        seen.append(G)
        largest = max(largest, float(G.abs().max()))
        scaler.update(r, done)
    spread = torch.cat(seen).var(correction=0).sqrt()
    assert float(spread) > largest / 5
    assert torch.allclose(scaler(r), r / spread, rtol=1e-4)
    scaler.update(torch.tensor([1000.0, 0.0], dtype=F64), torch.tensor([False, False]))
    G = gamma * G + torch.tensor([1000.0, 0.0], dtype=F64)
    assert torch.allclose(scaler(r), r / (G.abs().max() / 5), rtol=1e-12)
    assert float(scaler(G).abs().max()) == pytest.approx(5.0)


def test_the_scaler_resumes_from_its_state_and_refuses_other_shapes() -> None:
    scaler, other = RewardScaler(2), RewardScaler(2)
    scaler.update(torch.tensor([1.0, -2.0]), torch.tensor([0, 1]))
    other.load_state_dict(scaler.state_dict())
    for one in (scaler, other):
        one.update(torch.tensor([3.0, 4.0]), torch.tensor([0, 0]))
    assert torch.equal(scaler(torch.ones(2)), other(torch.ones(2)))
    with pytest.raises(ValueError, match="one entry for each environment"):
        scaler.update(torch.ones(3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"gamma=1\.5"):
        RewardScaler(gamma=1.5)
