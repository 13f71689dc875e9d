"""Gazal-R1 (arXiv 2506.21594): the loss of GRPO (arXiv 2402.03300), a reward of parts, and the two stages."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from adapt.cases import gpt, loss_of, tokens
from conformance.cases import mutated
from torch import Tensor

from poise import catalog
from poise.adapt import DoRA, attach, attached, detach
from poise.adapt.methods.gazal_r1 import Group, Reward, gazal_r1, grpo_loss
from poise.optim import AdamW

EXAMPLE = Path(__file__).parents[3] / "examples" / "two_stage_training.py"
REWARDS = torch.tensor([1.0, 0.0, 0.5, 2.0], dtype=torch.float64)


def given(seed: int = 0, far: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, the old ones, and a mask of answers of 5, 3, 1 and 0 tokens."""
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(4, 5, generator=generator, dtype=torch.float64)
    logp = (old + far * torch.randn(4, 5, generator=generator, dtype=torch.float64)).requires_grad_()
    return logp, old, (torch.arange(5) < torch.tensor([[5], [3], [1], [0]])).double()


def advantages(eps: float = 1e-4) -> Tensor:
    return (REWARDS - REWARDS.mean()) / (REWARDS.std(correction=0) + eps)


@pytest.mark.parametrize("average", ["answer", "token"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_loss_is_its_formula_token_by_token(average: Any, beta: float) -> None:
    logp, old, mask = given(far=0.4)
    reference = old - 0.1
    found = grpo_loss(logp, old, mask, REWARDS, clip=(0.1, 0.3), average=average, reference=reference, beta=beta)
    answers = []
    for i, a in enumerate(advantages()):
        terms = []
        for t in range(int(mask[i].sum())):
            q, d = (logp[i, t] - old[i, t]).exp(), reference[i, t] - logp[i, t]
            terms.append(-torch.minimum(q * a, q.clamp(0.9, 1.3) * a) + beta * (d.exp() - d - 1))
        answers.append(torch.stack(terms) if terms else torch.zeros(0, dtype=torch.float64))
    whole = torch.cat(answers)
    means = torch.stack([some.mean() if len(some) else some.sum() for some in answers])
    torch.testing.assert_close(found, whole.mean() if average == "token" else means.mean(), rtol=1e-12, atol=1e-12)


def test_at_the_old_policy_its_gradient_is_the_policy_gradient() -> None:
    logp, old, mask = given()
    grpo_loss(logp, old, mask, REWARDS).backward()
    counts = mask.sum(1, keepdim=True).clamp(min=1)
    wanted = -(advantages()[:, None] * mask / counts) / 4
    torch.testing.assert_close(logp.grad, wanted, rtol=1e-12, atol=1e-14)


def test_a_better_answer_becomes_likelier_and_a_worse_one_less_and_the_scale_of_rewards_does_not_matter() -> None:
    logp, old, mask = given()
    (one,) = torch.autograd.grad(grpo_loss(logp, old, mask, REWARDS), logp)
    assert (one[0] < 0).sum() == 5
    assert (one[1][:3] > 0).all()
    (other,) = torch.autograd.grad(grpo_loss(logp, old, mask, 100 * REWARDS + 7), logp)
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_equal_rewards_teach_nothing() -> None:
    logp, old, mask = given(far=0.4)
    (found,) = torch.autograd.grad(grpo_loss(logp, old, mask, torch.full((4,), 3.0, dtype=torch.float64)), logp)
    assert not found.any()


def test_equal_rewards_tell_it_from_its_mutant() -> None:
    logp, old, mask = given(far=0.4)
    wrong = mutated(catalog.get("gazal-r1")).__globals__["grpo_loss"]
    (found,) = torch.autograd.grad(wrong(logp, old, mask, torch.full((4,), 3.0, dtype=torch.float64)), logp)
    assert found.any()


@pytest.mark.parametrize(
    ("move", "better", "counts"), [(0.5, True, False), (0.5, False, True), (-0.5, True, True), (-0.5, False, False)]
)
def test_ratios_are_clipped_where_going_on_would_pay(move: float, better: bool, counts: bool) -> None:
    old = torch.zeros(2, 1, dtype=torch.float64)
    logp = (old + move).requires_grad_()
    rewards = torch.tensor([1.0, 0.0], dtype=torch.float64)
    (found,) = torch.autograd.grad(grpo_loss(logp, old, torch.ones(2, 1), rewards), logp)
    assert bool(found[0 if better else 1, 0] != 0) == counts


def test_what_stands_behind_an_answer_is_not_seen() -> None:
    logp, old, mask = given(far=0.2)
    wanted = grpo_loss(logp, old, mask, REWARDS, reference=old, beta=0.1)
    with torch.no_grad():
        logp[mask == 0] = 1e4
    assert torch.equal(grpo_loss(logp, old, mask, REWARDS, reference=old, beta=0.1), wanted)
    (found,) = torch.autograd.grad(grpo_loss(logp, old, mask, REWARDS), logp)
    assert not found[mask == 0].any()
    assert found.isfinite().all()


def test_staying_near_the_reference_costs_nothing_at_it_and_something_elsewhere() -> None:
    logp, old, mask = given()
    plain = grpo_loss(logp, old, mask, REWARDS)
    assert torch.equal(grpo_loss(logp, old, mask, REWARDS, reference=logp, beta=0.5), plain)
    for shift in (-0.3, 0.3):
        assert grpo_loss(logp, old, mask, REWARDS, reference=old + shift, beta=0.5) > plain


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": torch.zeros(3)}, r"rewards: \[4, 5\], \[4, 5\], \[4, 5\], \[3\]"),
        ({"mask": torch.ones(4, 4)}, r"\[4, 4\]"),
        ({"clip": (1.5, 0.2)}, r"clip=\(1\.5, 0\.2\)"),
        ({"average": "batch"}, "average='batch'"),
        ({"beta": 0.1}, "reference is needed"),
    ],
)
def test_settings_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    logp, old, mask = given()
    with pytest.raises(ValueError, match=message):
        grpo_loss(**{"logp": logp, "old": old, "mask": mask, "rewards": REWARDS, **change})


def test_a_reward_has_its_parts() -> None:
    reward = Reward(room=4, accuracy=1.0, form=0.5, length=0.25, repetition=0.3, ngram=2)
    assert reward([1, 2, 3], right=True, well_formed=True) == 1.5
    assert reward([1, 2, 3], right=False, well_formed=True) == 0.5
    assert reward([1, 2, 3, 4, 5, 6], right=True, well_formed=False) == 1.0 - 0.25 * 0.5
    assert reward([1, 1, 1, 1], right=False, well_formed=False) == pytest.approx(-0.3 * 2 / 3)
    assert reward([], right=False, well_formed=False) == 0.0
    with pytest.raises(ValueError, match="room=0"):
        Reward(room=0)


def group(model: Any, seed: int) -> Group:
    rows = torch.randint(0, 64, (6, 8), generator=torch.Generator().manual_seed(seed))
    rewards = (rows[:, 1:] < 32).double().mean(1)  # answers of small numbers are good
    return Group(rewards, lambda: model(rows[:, :-1]).log_softmax(-1).gather(2, rows[:, 1:, None]).squeeze(2), torch.ones(6, 7))


def test_both_stages_train_one_adapter_and_nothing_else() -> None:
    model = gpt()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    made: list[Any] = []

    def optimizer(model: Any) -> Any:
        made.append(AdamW(model, lr=0.01, backend="eager"))
        return made[-1]

    x = tokens(model)
    course = gazal_r1(
        model, [lambda: loss_of(model, x)] * 4, [lambda i=i: group(model, i) for i in range(3)], optimizer, seed=0
    )
    assert len(made) == 2
    assert len(course.losses) == 4
    assert course.losses[-1] < course.losses[0]
    assert len(course.rewards) == 3
    kept = attached(model)
    assert kept is not None
    assert isinstance(kept.method, DoRA)
    assert kept.method.scale == 4.0
    detach(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_adapters_that_stand_go_on_training_and_several_passes_are_clipped() -> None:
    model = gpt()
    attach(model, "lora")
    course = gazal_r1(
        model, (), [lambda: group(model, 0)], lambda m: AdamW(m, lr=0.01, backend="eager"), passes=3, clip=(0.1, 0.28)
    )
    assert len(course.rewards) == 1
    with pytest.raises(ValueError, match="has adapters already"):
        gazal_r1(model, (), (), lambda m: AdamW(m, lr=0.01), method=DoRA())
    with pytest.raises(ValueError, match="passes=0"):
        gazal_r1(model, (), (), lambda m: AdamW(m, lr=0.01), passes=0)


@pytest.mark.filterwarnings("ignore:poise. no C.. compiler")
def test_the_example_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")  # compiling kernels would take longer than this training
    found, losses, rewards = runpy.run_path(str(EXAMPLE))["train"](steps=8, rounds=3, answers=4)
    assert len(found) == 3
    assert losses[-1] < losses[0]
    assert len(rewards) == 3
