"""all-MiniLM-L6-v2 tells meanings of nouns apart by sentences that use them: a study of `adapters.py`."""

from __future__ import annotations

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2]
if str(BENCHMARKS) not in sys.path:  # a worker of a comparison opens this file by itself
    sys.path.append(str(BENCHMARKS))

from glosses import Glosses  # noqa: E402

TASK = Glosses()
unit, fingerprint = TASK.unit, TASK.fingerprint
model, batches, loss = TASK.model, TASK.batches, TASK.loss
