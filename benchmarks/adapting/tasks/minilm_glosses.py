"""all-MiniLM-L6-v2 tells meanings of nouns apart by sentences that use them: a study of `adapters.py`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn

from poise.compare.tasks import Split

BENCHMARKS = Path(__file__).resolve().parents[2]
if str(BENCHMARKS) not in sys.path:  # a worker of a comparison opens this file by itself
    sys.path.append(str(BENCHMARKS))

from glosses import Batch, Glosses  # noqa: E402

TASK = Glosses()
unit, fingerprint = TASK.unit, TASK.fingerprint


def model() -> nn.Module:
    return TASK.model()


def batches(split: Split, seed: int = 0) -> Iterator[Batch]:
    return TASK.batches(split, seed)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return TASK.loss(model, batch)
