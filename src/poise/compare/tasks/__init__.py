"""What methods are weighed on: a model, its data in three splits, and a loss.

`train` is trained on, `tune` chooses each method's hyper-parameters, `report` gives the number that is printed. A file never
stands in two of them.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor, nn

Split = Literal["train", "tune", "report"]

# Tasks that need no download: name -> where its class is. Imported when asked for.
EMBEDDED = {
    "code-lm": "poise.compare.tasks.code_lm:Task",
    "code-lm-small": "poise.compare.tasks.code_lm:small",
    "code-lm-large": "poise.compare.tasks.code_lm:large",
    "digits": "poise.compare.tasks.digits:Task",
    "convex": "poise.compare.tasks.problems:Convex",
    "ill-conditioned": "poise.compare.tasks.problems:IllConditioned",
    "non-smooth": "poise.compare.tasks.problems:NonSmooth",
    "matrix-recovery": "poise.compare.tasks.problems:MatrixRecovery",
}


class Task(Protocol):
    """A problem that a method is tried on. It may also have `optimum`, the lowest loss there is."""

    @property
    def name(self) -> str: ...

    @property
    def unit(self) -> str:
        """Of the loss; may be empty."""
        ...

    @property
    def fingerprint(self) -> str:
        """Digest of the data: two results may be laid side by side only if theirs are equal."""
        ...

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
        module, _, cls = EMBEDDED[name].partition(":")
        return getattr(importlib.import_module(module), cls)()
    if name.endswith(".py"):
        from poise.compare.tasks.user import UserTask

        return UserTask(Path(name))
    raise ValueError(f"task {name!r} is unknown; known: {', '.join(EMBEDDED)}, or a FILE.py with model(), batches() and loss()")


def array_digest(*arrays: np.ndarray) -> str:
    """SHA-256 over shapes, dtypes and contents."""
    whole = hashlib.sha256()
    for array in arrays:
        whole.update(f"{array.dtype.str}{array.shape}".encode())
        whole.update(np.ascontiguousarray(array).tobytes())
    return whole.hexdigest()
