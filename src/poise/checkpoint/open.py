"""One door to weights of every kind."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import Checkpoint, StateDict
from .directory import INDEX, ModelDirectory
from .errors import CheckpointError
from .files import opened, read_bytes, sound
from .gguf import GGUFFile
from .peft_directory import CONFIG as ADAPTER
from .peft_directory import PeftDirectory
from .pickled import OLD, ZIP, PickledFile
from .safetensors_file import SafetensorsFile
from .sharded import Sharded


def open_checkpoint(
    source: str | Path | Mapping[str, Tensor] | torch.nn.Module | Checkpoint, *, strict: bool = True
) -> Checkpoint:
    """Open weights for reading, wherever they lie; no tensor is read.

    | source | what it is opened as |
    |---|---|
    | directory with `adapter_config.json` | `PeftDirectory` |
    | directory with a model, in safetensors or else pickled | `ModelDirectory` |
    | directory with nothing but one GGUF file; a GGUF file | `GGUFFile` |
    | index of shards | `Sharded` |
    | file of safetensors; of torch.save, told apart by their first bytes | `SafetensorsFile`; `PickledFile` |
    | mapping of names to tensors, module | `StateDict` |
    | checkpoint | itself |

    Args:
        source: where the weights are.
        strict: refuse a model directory that transformers would load with a head drawn at random (`ModelDirectory`). If False,
            the error is in the checkpoint's `warnings`.

    Raises:
        CheckpointError: names the file, the tensor, what is wrong, and the cure.
        TypeError: for a source of another kind.
    """
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, Mapping | torch.nn.Module):
        return StateDict(source)
    if not isinstance(source, str | os.PathLike):
        kinds = "a path, a mapping of names to tensors, a module or a checkpoint"
        raise TypeError(f"source must be {kinds}, not {type(source).__name__}")
    path = Path(source)
    with sound(path):
        mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        return _open_directory(path, strict)
    if not stat.S_ISREG(mode):
        raise CheckpointError("is neither a file nor a directory", cure="give the path of a file on disk", file=path)
    return _open_file(path)


def _open_directory(path: Path, strict: bool) -> Checkpoint:
    with sound(path):
        names = sorted(os.listdir(path))
    models = [n for n in names if n.startswith(("model.safetensors", "pytorch_model.bin"))]
    if ADAPTER in names:
        if models:
            problem = f"has both an adapter, {ADAPTER}, and a model, {models[0]}"
            raise CheckpointError(problem, cure=f"move one of them out, or open {models[0]} by its own path", file=path)
        return PeftDirectory(path)
    ggufs = [n for n in names if n.endswith(".gguf")]
    others = [n for n in names if n.endswith((".safetensors", INDEX, ".bin"))]
    if ggufs and not others:
        if len(ggufs) > 1:
            problem = f"has several GGUF files: {', '.join(ggufs[:8])}"
            raise CheckpointError(problem, cure="give the path of the one that is meant", file=path)
        return GGUFFile(path / ggufs[0])
    return ModelDirectory(path, strict=strict)


def _open_file(path: Path) -> Checkpoint:
    if path.name.endswith(INDEX):
        return Sharded(path, PickledFile if path.name.endswith(f".bin{INDEX}") else SafetensorsFile)
    with opened(path) as fd:
        head = read_bytes(fd, 0, min(16, os.fstat(fd).st_size), path)
    if head[:4] == b"GGUF":
        return GGUFFile(path)
    # A length that begins like a zip archive is a legal one, of 67 MB; then the header follows.
    if head.startswith((ZIP, OLD)) and head[8:9] != b"{":
        return PickledFile(path)
    return SafetensorsFile(path)
