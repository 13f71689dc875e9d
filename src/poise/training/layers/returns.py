"""Rewards and values whose size never reaches the network, as SimbaV2 has them: scaled rewards, and values as distributions.

Source: "Hyperspherical Normalization for Scalable Deep Reinforcement Learning" (arXiv 2502.15280) and its code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def two_hot(values: Tensor, low: float = -5.0, high: float = 5.0, bins: int = 101, weights: Tensor | None = None) -> Tensor:
    """Values as distributions over `bins` equally spaced numbers between `low` and `high`, each on the two that surround it.

    The distribution's mean is the value, exactly, unless the value lies outside [low, high] and is clipped. With `weights`, of
    the shape of `values` (..., atoms), the last dimension is summed: the projection of a distribution with these atoms, such
    as `clip(r + gamma (1 - done) z)` with the probabilities of the bins z.

    Returns:
        (..., bins), or (..., bins) without the dimension of atoms if weighted. A cross-entropy with it trains a value head.

    Raises:
        ValueError: fewer than two bins, `low` not below `high`, or `weights` of another shape.
    """
    if bins < 2 or not low < high:
        raise ValueError(f"low={low}, high={high}, bins={bins}: needs low < high and two bins or more")
    place = (values.clamp(low, high) - low) / ((high - low) / (bins - 1))
    below = place.floor().clamp(max=bins - 2)
    above = place - below
    shares = torch.stack([1 - above, above], dim=-1)
    where = torch.stack([below, below + 1], dim=-1).long()
    if weights is not None:
        if weights.shape != values.shape or values.ndim < 1:
            raise ValueError(f"weights {tuple(weights.shape)} must have the shape of values {tuple(values.shape)}, atoms last")
        shares, where = (shares * weights.unsqueeze(-1)).flatten(-2), where.flatten(-2)
    return shares.new_zeros(*shares.shape[:-1], bins).scatter_add(-1, where, shares)


def expected_value(probabilities: Tensor, low: float = -5.0, high: float = 5.0) -> Tensor:
    """The mean of distributions (..., bins) over equally spaced numbers between `low` and `high`."""
    bins = torch.linspace(low, high, probabilities.shape[-1], dtype=probabilities.dtype, device=probabilities.device)
    return probabilities @ bins


class RunningMoments(nn.Module):
    """Mean and population variance of all that `update` has seen, over every dimension but the last ones of `shape`.

    They start at 0 and 1, counted as 1e-4 of an observation. `forward(x)`, `(x - mean) / sqrt(var + 1e-8)`, normalizes x.
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(1e-4, dtype=torch.float64))

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take in x (..., *shape)."""
        if tuple(x.shape[x.ndim - self.mean.ndim :]) != tuple(self.mean.shape) or x.numel() == 0:
            raise ValueError(f"x {tuple(x.shape)}: its last dimensions must be {tuple(self.mean.shape)}, and it not empty")
        x = x.to(self.mean).reshape(-1, *self.mean.shape)
        gap, total = x.mean(0) - self.mean, self.count + len(x)
        spread = self.var * self.count + x.var(0, correction=0) * len(x) + gap.square() * self.count * len(x) / total
        self.mean.add_(gap * len(x) / total)
        self.var.copy_(spread / total)
        self.count.copy_(total)

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.mean) / (self.var + 1e-8).sqrt()).to(x.dtype)


class RewardScaler(nn.Module):
    """Rewards divided so that discounted returns have about unit variance and stay within `bound`.

        G <- gamma (1 - done) G + r;   r / max(sqrt(var[G] + 1e-8), max |G| / bound)

    var[G] pools environments and time.

    Args:
        environments: run in parallel: rewards come as (environments,).
        gamma: 0.99. bound: 5, the edge of the value head's bins.
    """

    returns: Tensor
    largest: Tensor

    def __init__(self, environments: int = 1, gamma: float = 0.99, bound: float = 5.0) -> None:
        super().__init__()
        if not 0 <= gamma <= 1 or not bound > 0:
            raise ValueError(f"gamma={gamma}, bound={bound}: gamma must be in [0, 1] and bound positive")
        self.gamma, self.bound = gamma, bound
        self.moments = RunningMoments()
        self.register_buffer("returns", torch.zeros(environments, dtype=torch.float64))
        self.register_buffer("largest", torch.tensor(0.0, dtype=torch.float64))

    @torch.no_grad()
    def update(self, rewards: Tensor, done: Tensor) -> None:
        """Take in one step of all environments."""
        if rewards.shape != self.returns.shape or done.shape != self.returns.shape:
            raise ValueError(
                f"rewards {tuple(rewards.shape)} and done {tuple(done.shape)} must have one entry for each environment: "
                f"{tuple(self.returns.shape)}"
            )
        self.returns.mul_(self.gamma * (1 - done.to(self.returns))).add_(rewards)
        self.moments.update(self.returns)
        self.largest.copy_(torch.maximum(self.largest, self.returns.abs().max()))

    def forward(self, rewards: Tensor) -> Tensor:
        divisor = torch.maximum((self.moments.var + 1e-8).sqrt(), self.largest / self.bound)
        return (rewards / divisor).to(rewards.dtype)
