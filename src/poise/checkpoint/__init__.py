"""Weights on disk: read lazily, written a tensor at a time, resumed after a crash, verified when done."""

from .checkpoint import Checkpoint, StateDict, TensorInfo, count_rows
from .errors import CheckpointError

__all__ = ["Checkpoint", "CheckpointError", "StateDict", "TensorInfo", "count_rows"]
