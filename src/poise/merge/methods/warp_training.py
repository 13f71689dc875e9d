"""The loop of WARP: runs for a reward with a moving anchor, merged, pulled back, and begun again from there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from poise.catalog import Paper, method, uniform

from ..protocol import merge_tensors
from .linear import linear
from .warp import Scope, warp

Loss = Callable[[nn.Module, nn.Module, Any], Tensor]


@method(
    "warp_training",
    family="merge",
    kind="solver",
    paper=Paper("On the Benefits of Weight Averaged Rewarded Policies", arxiv="2406.16768", year=2024),
    tune={"eta": uniform(0.05, 1.0), "mu": uniform(0.001, 0.1)},
    mutant=("old.lerp_(new, self.mu)", "old.lerp_(new, 1 - self.mu)"),
)
class WarpTraining:
    """Fine-tunes a policy for a reward without losing what it was: three averages of weights.

        every run:   theta <- theta - step of loss(theta, theta_ema);   theta_ema <- (1 - mu) theta_ema + mu theta
        every round: theta_slerp = spherical mean of the runs about theta_0;   theta_0 <- (1 - eta) theta_0 + eta theta_slerp

        training = WarpTraining(policy, loss, lambda params: torch.optim.Adam(params, lr=1e-6))
        for number in range(rounds):
            training.round([prompts(number, run) for run in range(2)])
        for eta, weights in training.front([0.0, 0.25, 0.5, 0.75, 1.0]):
            ...  # reward and KL of each: choose

    Args:
        policy: any module. It is not trained itself; after each round it holds the new start.
        loss: `(policy, anchor, batch) -> number`, `policy_gradient` of log probabilities and rewards usually. The anchor has no
            gradients.
        optimizer: of a run's parameters.
        mu: 0.01, of the anchor. 0 keeps it at the start.
        eta: 0.3, the pull towards the start.
        scope: see `warp`.

    Raises:
        ValueError: mu or eta outside of [0, 1].

    The paper: 2 runs of 9000 steps, batch 128, Adam with learning rate 1e-6 after 100 warm-up steps, beta 0.1, runs that differ
    in the order of prompts alone. Source: "On the Benefits of Weight Averaged Rewarded Policies" (arXiv 2406.16768).
    """

    def __init__(
        self,
        policy: nn.Module,
        loss: Loss,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        *,
        mu: float = 0.01,
        eta: float = 0.3,
        scope: Scope = "layer",
    ) -> None:
        for name, value in (("mu", mu), ("eta", eta)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value}: must be from 0 to 1")
        self.policy, self.loss, self.optimizer = policy, loss, optimizer
        self.mu, self.eta, self.scope = mu, eta, scope
        self.first = _state(policy)
        self.merged = _state(policy)  # the last spherical mean

    def run(self, batches: Iterable[Any]) -> dict[str, Tensor]:
        """One run from the present start; returns its weights."""
        policy, anchor = copy.deepcopy(self.policy), copy.deepcopy(self.policy).requires_grad_(False)
        opt = self.optimizer([p for p in policy.parameters() if p.requires_grad])
        for batch in batches:
            opt.zero_grad()
            self.loss(policy, anchor, batch).backward()
            opt.step()
            self.follow(anchor, policy)
        return _state(policy)

    @torch.no_grad()
    def follow(self, anchor: nn.Module, policy: nn.Module) -> None:
        """Move the anchor mu of the way to the policy."""
        for old, new in zip(anchor.parameters(), policy.parameters(), strict=True):
            old.lerp_(new, self.mu)

    def round(self, runs: Sequence[Iterable[Any]]) -> None:
        """Run once for each of `runs`, an iterable of batches; merge; and let the policy begin there next time."""
        if not runs:
            raise ValueError("runs: at least one is needed")
        start = _state(self.policy)
        ends = [self.run(batches) for batches in runs]
        self.merged = merge_tensors(warp, ends, start, eta=1.0, scope=self.scope)
        self.policy.load_state_dict(merge_tensors(linear, [start, self.merged], weight=(1 - self.eta, self.eta)))

    def front(self, etas: Iterable[float]) -> Iterator[tuple[float, dict[str, Tensor]]]:
        """Weights between the first policy, at 0, and the last spherical mean, at 1: reward against distance."""
        for eta in etas:
            yield eta, merge_tensors(linear, [self.first, self.merged], weight=(1 - eta, eta))


def policy_gradient(log_p: Tensor, log_anchor: Tensor, reward: Tensor, beta: float = 0.1, baseline: bool = True) -> Tensor:
    """REINFORCE's loss for rewards of which the distance to the anchor is taken off.

        - mean of (r - beta log(pi(y|x) / pi_anchor(y|x)) - b) log pi(y|x),   b the batch's mean, or 0

    Args:
        log_p, log_anchor: log probability of every sampled answer, under policy and anchor.
        reward: of every answer.
        beta: 0.1.
    """
    gain = (reward - beta * (log_p - log_anchor)).detach()
    if baseline:
        gain = gain - gain.mean()
    return -(gain * log_p).mean()


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in module.state_dict().items()}
