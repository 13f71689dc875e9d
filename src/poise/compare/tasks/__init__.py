"""What methods are weighed on: a model, its data in three splits, and a loss.

`train` is trained on, `tune` chooses each method's hyper-parameters, `report` gives the number that is printed. A file never
stands in two of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor, nn

Split = Literal["train", "tune", "report"]

# Tasks that need no download: name -> module with a class `Task`. Imported when asked for.
EMBEDDED = {"code-lm": "poise.compare.tasks.code_lm"}


class Task(Protocol):
    """A problem that a method is tried on."""

    name: str
    unit: str  # of the loss; may be empty
    fingerprint: str  # digest of the data: two results may be laid side by side only if theirs are equal

    def model(self) -> nn.Module:
        """A fresh model, initialised from torch's global generator, which the caller has seeded."""
        ...

    def batches(self, split: Split, seed: int) -> Iterator[Any]:
        """Batches without end for "train", in an order that `seed` alone decides; a fixed, finite set for the other splits."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Mean loss of `model` on one batch, 0-d."""
        ...


def load(name: str) -> Task:
    """The embedded task called `name`, or the one in the Python file `name`.

    Raises:
        ValueError: if there is no such task, or the file does not define `model`, `batches` and `loss`.
    """
    if name in EMBEDDED:
        return importlib.import_module(EMBEDDED[name]).Task()
    if name.endswith(".py"):
        from poise.compare.tasks.user import UserTask

        return UserTask(Path(name))
    raise ValueError(f"task {name!r} is unknown; known: {', '.join(EMBEDDED)}, or a FILE.py with model(), batches() and loss()")
