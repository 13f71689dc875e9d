"""The same with CompAct layers at rank 1/4: activations kept as random projections, and optimizer state as small."""

from __future__ import annotations

import sys
from pathlib import Path

from torch import nn

from poise.training import CompAct

sys.path.insert(0, str(Path(__file__).parent))
from code_lm_30m import TASK, batches, fingerprint, loss

__all__ = ["batches", "fingerprint", "loss", "model"]


def model() -> nn.Module:
    return CompAct.attach(TASK.model(), rank=0.25)
