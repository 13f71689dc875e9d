"""Weights on disk: read lazily, written a tensor at a time, resumed after a crash, verified when done."""

from .checkpoint import Checkpoint, StateDict, TensorInfo, count_rows
from .comparing import Bounds, Comparison, verify
from .directory import ModelDirectory, declared_dtype
from .errors import CheckpointError
from .gguf import GGUFFile
from .lora import Delta, Full, Update
from .open import open_checkpoint
from .peft_directory import PeftDirectory
from .pickled import PickledFile
from .safetensors_file import SafetensorsFile
from .sharded import Sharded

__all__ = [
    "Bounds",
    "Checkpoint",
    "CheckpointError",
    "Comparison",
    "Delta",
    "Full",
    "GGUFFile",
    "ModelDirectory",
    "PeftDirectory",
    "PickledFile",
    "SafetensorsFile",
    "Sharded",
    "StateDict",
    "TensorInfo",
    "Update",
    "count_rows",
    "declared_dtype",
    "open_checkpoint",
    "verify",
]
