"""The loss of a task with weights from elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from poise.checkpoint import CheckpointError, StateDict
from poise.compare.loop import evaluate
from poise.compare.scoring import score
from poise.compare.tasks import Task, load
from poise.models import GPT, GPTConfig


class Tied:
    """A language model whose head is its embedding, on random bytes."""

    name, unit, fingerprint = "tied", "nats", ""

    def model(self) -> nn.Module:
        return GPT(GPTConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, tie_word_embeddings=True))

    def batches(self, split: str, seed: int) -> object:
        yield torch.arange(40)[None] * 11 % 256

    def loss(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def test_the_loss_is_that_of_the_model_the_weights_are_from() -> None:
    task = load("digits")
    torch.manual_seed(3)
    model = task.model()
    assert score(task, StateDict(model)) == evaluate(task, model, "report", 0)
    half = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    assert score(task, StateDict(half)) == pytest.approx(evaluate(task, model, "report", 0), rel=1e-2)


@pytest.mark.parametrize("stored", ["once", "twice", "as a module"])
def test_tied_weights_may_be_stored_either_way(stored: str) -> None:
    task: Task = Tied()  # pyright: ignore[reportAssignmentType]
    torch.manual_seed(1)
    model = task.model()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if stored == "once":
        del weights["lm_head.weight"]
    given = StateDict(model) if stored == "as a module" else StateDict(weights)
    assert score(task, given) == pytest.approx(evaluate(task, model, "report", 0), rel=1e-6)


def test_weights_of_another_model_are_refused_by_name() -> None:
    task = load("digits")
    weights = dict(task.model().state_dict())
    name = next(iter(weights))
    with pytest.raises(CheckpointError, match=f"'{name}': is in the model and not in the checkpoint"):
        score(task, StateDict({other: t for other, t in weights.items() if other != name}))
    with pytest.raises(CheckpointError, match=r"'extra': is in the checkpoint and not in the model; .*'digits'"):
        score(task, StateDict(weights | {"extra": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"has shape \[3\]"):
        score(task, StateDict(weights | {name: torch.zeros(3)}))
