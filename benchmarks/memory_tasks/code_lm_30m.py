"""The language model of code-lm at 30M parameters: eight blocks of width 512, batches of 8 x 256 bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from poise.compare.tasks.code_lm import Task

TASK = Task(name="code-lm-30m", width=560, layers=8, batch_size=8, context=256)
fingerprint = TASK.fingerprint


def model() -> nn.Module:
    return TASK.model()


def batches(split: Any, seed: int = 0) -> Iterator[Any]:
    return TASK.batches(split, seed)


def loss(model: nn.Module, batch: Any) -> Tensor:
    return TASK.loss(model, batch)
