"""A GPT that has read Python reads prose: a study of `adapters.py`. `adapters.py base` trains it first."""

from __future__ import annotations

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2]
if str(BENCHMARKS) not in sys.path:  # a worker of a comparison opens this file by itself
    sys.path.append(str(BENCHMARKS))

from text_domains import Text  # noqa: E402

TASK = Text(("prose",), BENCHMARKS.parent / "runs" / "adapters" / "base" / "model")
unit, fingerprint = TASK.unit, TASK.fingerprint
model, batches, loss = TASK.model, TASK.batches, TASK.loss
