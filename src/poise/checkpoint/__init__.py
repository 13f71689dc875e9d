"""Weights on disk: read lazily, written a tensor at a time, resumed after a crash, verified when done."""

from .checkpoint import Checkpoint, StateDict, TensorInfo, count_rows
from .comparing import Bounds, Comparison, verify
from .config import config_for
from .directory import ModelDirectory, declared_dtype
from .errors import CheckpointError
from .gguf import GGUFFile
from .journal import altered
from .lora import Delta, Full, Update
from .open import open_checkpoint
from .peft_directory import PeftDirectory
from .pickled import PickledFile
from .planned import Planned, check_disk, parse_size, planned_memory
from .safetensors_file import SafetensorsFile
from .sharded import Sharded
from .shards import plan_shards
from .side_files import side_files
from .writing import Interrupted, Written, write

__all__ = [
    "Bounds",
    "Checkpoint",
    "CheckpointError",
    "Comparison",
    "Delta",
    "Full",
    "GGUFFile",
    "Interrupted",
    "ModelDirectory",
    "PeftDirectory",
    "PickledFile",
    "Planned",
    "SafetensorsFile",
    "Sharded",
    "StateDict",
    "TensorInfo",
    "Update",
    "Written",
    "altered",
    "check_disk",
    "config_for",
    "count_rows",
    "declared_dtype",
    "open_checkpoint",
    "parse_size",
    "plan_shards",
    "planned_memory",
    "side_files",
    "verify",
    "write",
]
