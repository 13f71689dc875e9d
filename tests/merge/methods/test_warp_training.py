"""WARP's loop (On the Benefits of Weight Averaged Rewarded Policies, arXiv 2406.16768)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from conformance.cases import batch, loss_of, mutated, net
from merge.cutting import largest_gap, same
from torch import Tensor, nn

from poise import catalog
from poise.merge import merge_tensors
from poise.merge.methods.warp import warp
from poise.merge.methods.warp_training import WarpTraining, policy_gradient

CONTEXTS, ARMS = 10, 8
REWARDS = torch.randn(CONTEXTS, ARMS, generator=torch.Generator().manual_seed(0))


def sgd(lr: float) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    return lambda params: torch.optim.SGD(params, lr=lr)


def supervised(policy: nn.Module, anchor: nn.Module, data: Any) -> Tensor:
    return loss_of(policy, data)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


class Softmax(nn.Module):
    """A policy with a number for every context and arm; it starts indifferent."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(CONTEXTS, ARMS))

    def forward(self, context: Tensor) -> Tensor:
        return self.logits[context].log_softmax(-1)


def pulled(policy: nn.Module, anchor: nn.Module, generator: torch.Generator) -> Tensor:
    """Eight pulls, whose rewards are noisy."""
    x = torch.randint(CONTEXTS, (8,), generator=generator)
    log_p = policy(x)
    arm = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
    reward = REWARDS[x].gather(1, arm) + 2 * torch.randn(8, 1, generator=generator)
    return policy_gradient(log_p.gather(1, arm), anchor(x).gather(1, arm), reward, beta=0.1)


def stream(seed: int, steps: int) -> Iterator[torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    yield from (generator for _ in range(steps))


def kl_and_reward(weights: dict[str, Tensor]) -> tuple[float, float]:
    log_p = weights["logits"].log_softmax(-1)
    return float((log_p.exp() * (log_p + math.log(ARMS))).sum(-1).mean()), float((log_p.exp() * REWARDS).sum(-1).mean())


def reward_at(front: list[tuple[float, float]], kl: float) -> float:
    """Between the points of a front, linearly."""
    for (k0, r0), (k1, r1) in pairwise(front):
        if k0 <= kl <= k1:
            return r0 + (r1 - r0) * (kl - k0) / (k1 - k0)
    raise AssertionError(f"a front that does not reach {kl}")


class Watched(WarpTraining):
    """Notes where the policy is, now and then."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.path = [kl_and_reward(self.first)]
        self.steps = 0

    def follow(self, anchor: nn.Module, policy: nn.Module) -> None:
        super().follow(anchor, policy)
        self.steps += 1
        if self.steps % 5 == 0:
            self.path.append(kl_and_reward(state(policy)))


def test_on_a_bandit_it_earns_more_at_the_same_distance_than_a_run_with_a_fixed_anchor() -> None:
    """Of as many pulls. Rewards are noisy, so that a single run drifts."""
    gains = []
    for seed in (0, 1):
        fixed = Watched(Softmax(), pulled, sgd(2.0), mu=0.0, eta=1.0)
        fixed.run(stream(100 * seed, 480))
        training = WarpTraining(Softmax(), pulled, sgd(2.0), eta=0.5)
        for number in range(4):
            training.round([stream(100 * seed + 10 * number + run + 1, 60) for run in range(2)])
        front = [kl_and_reward(weights) for _, weights in training.front([i / 20 for i in range(21)])]
        gains += [reward_at(front, kl) - reward_at(fixed.path, kl) for kl in (0.4, 0.6, 0.8)]
    assert min(gains) > 0.02, gains


def test_one_run_without_pull_is_plain_training() -> None:
    training = WarpTraining(net(), supervised, sgd(0.1), eta=1.0)
    twin = net()
    opt = torch.optim.SGD(twin.parameters(), lr=0.1)
    training.round([[batch(seed=i) for i in range(3)]])
    for i in range(3):
        opt.zero_grad()
        loss_of(twin, batch(seed=i)).backward()
        opt.step()
    assert same(state(training.policy), state(twin))


def test_a_round_is_runs_merged_and_pulled_back() -> None:
    training = WarpTraining(net(), supervised, sgd(0.5), eta=0.3)
    start = state(training.policy)
    runs = [[batch(seed=i) for i in range(4)], [batch(seed=i + 10) for i in range(4)]]
    ends = [copy.deepcopy(training).run(batches) for batches in runs]
    training.round(runs)
    assert same(training.merged, merge_tensors(warp, ends, start, eta=1.0))
    assert largest_gap(state(training.policy), merge_tensors(warp, ends, start, eta=0.3)) < 1e-7
    front = dict(training.front([0.0, 1.0]))
    assert same(front[0.0], start) and same(front[1.0], training.merged)


def test_without_eta_the_start_stays() -> None:
    training = WarpTraining(net(), supervised, sgd(0.5), eta=0.0)
    before = state(training.policy)
    training.round([[batch()]])
    assert same(state(training.policy), before) and not same(training.merged, before)


def anchors_error(method: type[WarpTraining], mu: float, steps: int) -> float:
    """How far the anchor still is from a policy that stands still, as a share of the first distance."""
    policy, anchor = nn.Linear(3, 2), nn.Linear(3, 2)
    first = (policy.weight - anchor.weight).detach().clone()
    training = method(policy, supervised, sgd(0.1), mu=mu)
    for _ in range(steps):
        training.follow(anchor, policy)
    return float(((policy.weight - anchor.weight) / first).detach().mean())


@pytest.mark.parametrize("mu", [0.01, 0.1])
def test_the_anchor_nears_a_policy_that_stands_still_geometrically(mu: float) -> None:
    for steps in (1, 10, 50):
        assert anchors_error(WarpTraining, mu, steps) == pytest.approx((1 - mu) ** steps, rel=1e-4)


def test_its_tests_tell_it_from_its_mutant() -> None:
    assert anchors_error(mutated(catalog.get("warp_training")), 0.01, 1) < 0.1  # pyright: ignore[reportArgumentType]


def test_the_policy_gradient_in_the_mean_is_that_of_reward_less_distance() -> None:
    policy, anchor = torch.randn(5, requires_grad=True), torch.randn(5)
    reward, beta = torch.randn(5), 0.3
    p, q = policy.log_softmax(0), anchor.log_softmax(0)
    (p.exp() * (reward - beta * (p - q))).sum().backward()
    wanted, policy.grad = policy.grad, None
    weighted = [
        p_i * policy_gradient(policy.log_softmax(0)[i : i + 1], q[i : i + 1], reward[i : i + 1], beta, False)
        for i, p_i in enumerate(p.detach().exp())
    ]
    torch.stack(weighted).sum().backward()
    assert wanted is not None and policy.grad is not None
    assert torch.allclose(-policy.grad, wanted, atol=1e-6)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"mu=2.0: must be from 0 to 1"):
        WarpTraining(net(), supervised, sgd(0.1), mu=2.0)
    with pytest.raises(ValueError, match="runs: at least one"):
        WarpTraining(net(), supervised, sgd(0.1)).round([])
