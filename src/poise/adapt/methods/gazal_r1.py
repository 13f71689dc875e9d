"""Gazal-R1: rank-stabilized DoRA taught by answers, then by the rewards of groups of its own answers (GRPO)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from poise.catalog import Paper, method

from ..attaching import attach, attached
from ..targets import Targets
from .dora import DoRA

Average = Literal["answer", "token"]


@dataclass(frozen=True)
class Group:
    """Several answers to one prompt.

    Attributes:
        rewards: of the answers, (answers,).
        logp: gives the log-probability of each token of each answer under the model as it is now, (answers, tokens).
        mask: which of these tokens belong to an answer, (answers, tokens).
    """

    rewards: Tensor
    logp: Callable[[], Tensor]
    mask: Tensor


@dataclass
class Course:
    """What the two stages did: the loss of every supervised step, and the mean reward of every group."""

    losses: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)


@method(
    "gazal-r1",
    family="adapt",
    kind="protocol",
    paper=Paper(
        "Achieving State-of-the-Art Medical Reasoning with Parameter-Efficient Two-Stage Training",
        arxiv="2506.21594",
        year=2025,
    ),
    mutant=("rewards - rewards.mean()", "rewards"),
)
def gazal_r1(
    model: nn.Module,
    supervised: Iterable[Callable[[], Tensor]],
    groups: Iterable[Callable[[], Group]],
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    *,
    method: DoRA | None = None,
    targets: Targets | None = None,
    passes: int = 1,
    clip: tuple[float, float] = (0.2, 0.2),
    average: Average = "answer",
    seed: int | None = None,
) -> Course:
    """Trains one adapter in two stages: on given answers, then on the rewards of groups of answers that the model draws.

        1  attach(model, DoRA(rank_stabilized=True)); for each loss of `supervised` one step
        2  for each group of answers, `passes` steps on `grpo_loss`; its old log-probabilities are those before them

    Each stage has an optimizer of its own, over what trains. The adapter stays attached: fold it, or export it.

    Args:
        model: a module that is not adapted, or one with adapters that go on training; `method` must not be given then.
        supervised: functions that each give the loss of a batch of prompts with their answers.
        groups: functions that each draw answers to one prompt, and judge them; `Reward` makes a reward of several parts.
        optimizer: of the model, made anew for each stage: `lambda model: AdamW(model, lr=1e-4)`.
        method: None: DoRA of rank 16 and alpha 16 with s = alpha / sqrt(rank).
        targets: as of `attach`.
        passes: steps on one group, 1: then no ratio is clipped, and the loss is the policy gradient.
        clip, average: as of `grpo_loss`.
        seed: of the adapter.

    Raises:
        ValueError: settings out of range, and those of `attach` and `grpo_loss`.

    The parts and the order are the paper's; ranks, learning rates, weights of rewards and what it changes in GRPO were not to
    be seen when this was written, so that all of them are arguments. `examples/two_stage_training.py` is a whole run. Source:
    "Gazal-R1: Achieving State-of-the-Art Medical Reasoning with Parameter-Efficient Two-Stage Training" (arXiv 2506.21594);
    GRPO: "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models" (arXiv 2402.03300).
    """
    if passes < 1:
        raise ValueError(f"passes={passes}: must be at least 1")
    if attached(model) is None:
        attach(model, method or DoRA(rank=16, alpha=16.0, rank_stabilized=True), targets, seed=seed)
    elif method is not None:
        raise ValueError(f"method={method}: the model has adapters already; leave it out, or detach(model) first")
    course = Course()
    opt = optimizer(model)
    for loss_of in supervised:
        course.losses.append(_stepped(opt, loss_of))
    opt = optimizer(model)
    for draw in groups:
        group = draw()
        with torch.no_grad():
            old = group.logp()
        for _ in range(passes):
            _stepped(opt, lambda group=group, old=old: _loss(group, old, clip, average))
        course.rewards.append(float(group.rewards.mean()))
    return course


def grpo_loss(
    logp: Tensor,
    old: Tensor,
    mask: Tensor,
    rewards: Tensor,
    *,
    clip: tuple[float, float] = (0.2, 0.2),
    average: Average = "answer",
    reference: Tensor | None = None,
    beta: float = 0.0,
    eps: float = 1e-4,
) -> Tensor:
    """The loss of a group of answers to one prompt, relative to each other.

        A_i  = (r_i - mean r) / (std r + eps)
        q_it = exp(logp_it - old_it)
        L_it = -min(q_it A_i, clip(q_it, 1 - clip[0], 1 + clip[1]) A_i) + beta (exp(d_it) - d_it - 1),   d = reference - logp

    Args:
        logp: log-probabilities of the answers' tokens under the model that trains, (answers, tokens).
        old: under the model that drew them; `logp.detach()` for one step a group.
        mask: 1 for tokens of answers, 0 behind their end.
        rewards: r, (answers,). If all are equal, the group teaches nothing.
        clip: how far below and above 1 the ratio q counts; an upper one of 0.28 lets rare tokens rise.
        average: "answer": over each answer's tokens, then over answers, as published; "token": over all tokens, so that long
            answers do not count less for each of their tokens.
        reference: log-probabilities under a model to stay near; None: none.
        beta: weight of that, 0.
        eps: 1e-4. The deviation is that of the group itself, divided by the number of answers.

    Raises:
        ValueError: shapes that do not belong together; settings out of range.
    """
    if logp.ndim != 2 or not logp.shape == old.shape == mask.shape or rewards.shape != logp.shape[:1]:
        shapes = ", ".join(str(list(t.shape)) for t in (logp, old, mask, rewards))
        raise ValueError(f"logp, old, mask, rewards: {shapes}; three must be (answers, tokens), and rewards (answers,)")
    if not (0 <= clip[0] <= 1 and clip[1] >= 0):
        raise ValueError(f"clip={clip}: must be a share below 1, in [0, 1], and one above, not negative")
    if average not in ("answer", "token"):
        raise ValueError(f"average={average!r}: must be 'answer' or 'token'")
    if beta and reference is None:
        raise ValueError(f"beta={beta}: reference is needed, log-probabilities of the model to stay near")
    advantages = ((rewards - rewards.mean()) / (rewards.std(correction=0) + eps)).to(logp.dtype).unsqueeze(1)
    weight = mask.to(logp.dtype)
    ratio = ((logp - old.detach()) * weight).exp()  # what stands behind an answer may be anything
    each = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip[0], 1 + clip[1]) * advantages)
    if reference is not None and beta:
        apart = (reference.detach() - logp) * weight
        each = each + beta * (apart.exp() - apart - 1)
    each = each * weight
    if average == "token":
        return each.sum() / weight.sum().clamp(min=1)
    return (each.sum(1) / weight.sum(1).clamp(min=1)).mean()


@dataclass(frozen=True)
class Reward:
    """A reward of several parts.

        accuracy [right] + form [well formed] - length max(0, n - room) / room - repetition (1 - distinct n-grams / n-grams)

    Args:
        accuracy, form: added for a right and for a well-formed answer: 1 and 0.2.
        length, repetition: weights of what is taken away: 0.2 and 0.2.
        room: tokens that an answer may have for nothing.
        ngram: length of what must not be repeated, 3.

    The paper has these parts; their weights and exact form are not known, so that the ones here are a choice.
    """

    room: int
    accuracy: float = 1.0
    form: float = 0.2
    length: float = 0.2
    repetition: float = 0.2
    ngram: int = 3

    def __post_init__(self) -> None:
        if self.room < 1 or self.ngram < 1:
            raise ValueError(f"room={self.room}, ngram={self.ngram}: must be at least 1")

    def __call__(self, tokens: Sequence[int], right: bool, well_formed: bool) -> float:
        runs = [tuple(tokens[i : i + self.ngram]) for i in range(len(tokens) - self.ngram + 1)]
        repeated = 1 - len(set(runs)) / len(runs) if runs else 0.0
        over = max(0, len(tokens) - self.room) / self.room
        return self.accuracy * right + self.form * well_formed - self.length * over - self.repetition * repeated


def _loss(group: Group, old: Tensor, clip: tuple[float, float], average: Average) -> Tensor:
    return grpo_loss(group.logp(), old, group.mask, group.rewards, clip=clip, average=average)


def _stepped(opt: torch.optim.Optimizer, loss_of: Callable[[], Tensor]) -> float:
    opt.zero_grad()
    loss = loss_of()
    loss.backward()
    opt.step()
    return float(loss.detach())
