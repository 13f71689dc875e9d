"""A Hugging Face model directory: weights, config and what lies beside them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import Checkpoint, TensorInfo
from .errors import CheckpointError
from .files import missing, read_json, sound
from .heads import find_head
from .pickled import PickledFile
from .safetensors_file import SafetensorsFile
from .sharded import Sharded

CONFIG = "config.json"
INDEX = ".index.json"
# safetensors before pickles, as transformers chooses.
STANDARD = ("model.safetensors", "pytorch_model.bin")
WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".npz"})


class ModelDirectory(Checkpoint):
    """A directory as `save_pretrained` writes it: one file or shards, safetensors or pickled, with `config.json` if it has one.

    Where both formats are there, safetensors are read. A head that is tied to the embedding, and so not stored, is in `ties`.

    Args:
        strict: refuse a directory that transformers would load with random weights in place of the missing head; if False, the
            error is in `warnings` instead.
    """

    def __init__(self, path: str | Path, *, strict: bool = True) -> None:
        self.path = self._path = Path(path)
        self._weights = open_weights(self._path)
        config = self._path / CONFIG
        with sound(config):
            self.config: Mapping[str, Any] = read_json(config) if os.path.lexists(config) else {}
        head = find_head(self._weights, self.config, config)
        self.ties: Mapping[str, str] = {**head.ties, **self._weights.ties}
        self.warnings = head.warnings
        if strict and self.warnings:
            raise self.warnings[0]
        self.side_files = find_side_files(self._path)
        self.metadata = self._weights.metadata

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def info(self, name: str) -> TensorInfo:
        return self._weights.info(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._weights.rows(name, start, stop)

    def fingerprint(self) -> str:
        return self._weights.fingerprint()


def open_weights(directory: Path) -> Checkpoint:
    """The weights of a directory, from whichever files hold them. CheckpointError if it is not plain which those are."""
    with sound(directory):
        names = set(os.listdir(directory))
    for standard in STANDARD:
        part = SafetensorsFile if standard == STANDARD[0] else PickledFile
        whole, index = standard in names, standard + INDEX in names
        if whole and index:
            problem = f"has {standard} and {standard}{INDEX}, two sets of weights"
            raise CheckpointError(problem, cure="delete the stale one, or name the one that is meant", file=directory)
        if whole:
            return part(directory / standard)
        if index:
            return Sharded(directory / (standard + INDEX), part)
    found = sorted(name for name in names if name.endswith(".safetensors"))
    indices = sorted(name for name in names if name.endswith(".safetensors" + INDEX))
    if len(indices) == 1:
        return Sharded(directory / indices[0], SafetensorsFile)
    if len(found) == 1 and not indices:
        return SafetensorsFile(directory / found[0])
    raise _none(directory, names, indices or found)


def _none(directory: Path, names: set[str], candidates: list[str]) -> CheckpointError:
    if not names:
        return CheckpointError("is empty", cure="check the path, or fetch the model again", file=directory)
    if candidates and all("-of-" in name for name in candidates):
        problem = f"has {len(candidates)} shards, {candidates[0]} and so on, and no {STANDARD[0]}{INDEX}"
        return CheckpointError(problem, cure="fetch the index as well", file=directory)
    if candidates:
        problem = f"has several files of weights: {', '.join(candidates[:8])}"
        return CheckpointError(problem, cure="give the path of the one that is meant", file=directory)
    others = sorted(name for name in names if Path(name).suffix in WEIGHTS)
    hint = f"; there is {', '.join(others[:8])}, which can be opened by its own path" if others else ""
    problem = f"has no weights: neither {STANDARD[0]} nor {STANDARD[1]}, nor an index of shards{hint}"
    return CheckpointError(problem, cure="check the path, or fetch the model again", file=directory)


def find_side_files(directory: Path, config: str = CONFIG) -> tuple[Path, ...]:
    """All files but weights, indices of weights and the config, sorted. Hidden ones are left out.

    A directory inside that has a config of its own, as sentence-transformers' modules have, is a part of the model: all of it
    is taken. Of others weights are left out too, since they are the same ones in another format.
    """
    found: list[Path] = []

    def unreadable(error: OSError) -> None:
        raise error

    with sound(directory):
        for folder, inner, names in os.walk(directory, onerror=unreadable):
            inner[:] = sorted(name for name in inner if not name.startswith(".") and name != "__pycache__")
            place = Path(folder)
            whole = place != directory and CONFIG in names
            for name in sorted(names):
                weights = Path(name).suffix in WEIGHTS or name.endswith(INDEX)
                own = place == directory and name == config
                if not name.startswith(".") and not own and (whole or not weights):
                    if not (place / name).is_file():
                        raise missing(place / name)
                    found.append(place / name)
    return tuple(found)


def declared_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that a config names, under `dtype` or the older `torch_dtype`; None if it names none that torch has."""
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping):
            name = part.get("dtype") or part.get("torch_dtype")
            found = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else None
            if isinstance(found, torch.dtype):
                return found
    return None
