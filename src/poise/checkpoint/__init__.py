"""Weights on disk: read lazily, written a tensor at a time, resumed after a crash, verified when done."""

from .checkpoint import Checkpoint, StateDict, TensorInfo, count_rows
from .config import config_for
from .errors import CheckpointError
from .journal import altered
from .planned import Planned, check_disk, parse_size, planned_memory
from .shards import plan_shards
from .side_files import side_files
from .writing import Interrupted, Written, write

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Interrupted",
    "Planned",
    "StateDict",
    "TensorInfo",
    "Written",
    "altered",
    "check_disk",
    "config_for",
    "count_rows",
    "parse_size",
    "plan_shards",
    "planned_memory",
    "side_files",
    "write",
]
