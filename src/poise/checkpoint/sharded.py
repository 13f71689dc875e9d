"""A checkpoint in several files, with an index that says which tensor lies in which."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from torch import Tensor

from .checkpoint import Checkpoint, TensorInfo
from .errors import CheckpointError
from .files import AGAIN, read_json


class Sharded(Checkpoint):
    """What an index and the files it names hold together, if they agree.

        {"metadata": {"total_size": 123}, "weight_map": {"wte.weight": "model-00001-of-00002.safetensors", ...}}

    Every file has to be there, in the index's own directory, and every tensor has to be in the file that the index names and in
    no other. Tensors come file by file, files sorted by name.

    Args:
        index: path of the index.
        part: how one file is opened, `SafetensorsFile` or `PickledFile`.
    """

    def __init__(self, index: str | Path, part: Callable[[Path], Checkpoint]) -> None:
        self.path = self._path = Path(index)
        named = _weight_map(read_json(self._path), self._path)
        parts = {file: part(self._path.parent / file) for file in sorted(set(named.values()))}
        self._held = _agreed(named, parts, self._path)
        self._parts = tuple(parts.values())
        self.ties: Mapping[str, str] = {other: name for part in self._parts for other, name in part.ties.items()}
        self.metadata = {key: value for part in reversed(self._parts) for key, value in part.metadata.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, name: object) -> bool:
        return name in self._held

    def info(self, name: str) -> TensorInfo:
        return self._held[name].info(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._held[name].rows(name, start, stop)

    def fingerprint(self) -> str:
        return hashlib.sha256("".join(part.fingerprint() for part in self._parts).encode()).hexdigest()


def _weight_map(index: Mapping[str, Any], path: Path) -> dict[str, str]:
    named = index.get("weight_map")
    if not isinstance(named, dict) or not named:
        raise CheckpointError("has no 'weight_map' with tensors in it", cure=AGAIN, file=path)
    for name, file in named.items():
        if not isinstance(file, str):
            raise CheckpointError(f"its file must be a string, not {file!r:.40}", cure=AGAIN, file=path, tensor=name)
        if not file or file in (".", "..") or {PurePosixPath(file).name, PureWindowsPath(file).name} != {file} or "\0" in file:
            problem = f"lies in {file!r:.200}, and an index may only name files in its own directory"
            raise CheckpointError(problem, cure="do not trust this checkpoint: get it from its author", file=path, tensor=name)
    return named


def _agreed(named: Mapping[str, str], parts: Mapping[str, Checkpoint], path: Path) -> dict[str, Checkpoint]:
    held: dict[str, Checkpoint] = {}
    where: dict[str, str] = {}
    for file, part in parts.items():
        for name in (*part, *part.ties):
            if name in where:
                problem = f"is in two files, {where[name]} and {file}"
                cure = "delete the file that is left over, or write both again"
                raise CheckpointError(problem, cure=cure, file=path, tensor=name)
            where[name] = file
        held.update(dict.fromkeys(part, part))
    cure = f"index and files are not of one checkpoint: {AGAIN}, index and all"
    for name, file in named.items():
        if name not in where:
            raise CheckpointError(f"should be in {file}, and is in no file", cure=cure, file=path, tensor=name)
        if where[name] != file:
            raise CheckpointError(f"should be in {file}, and is in {where[name]}", cure=cure, file=path, tensor=name)
    for name, file in where.items():
        if name not in named:
            raise CheckpointError(f"is in {file}, and not in the index", cure=cure, file=path, tensor=name)
    return held
