"""One safetensors file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import Checkpoint, TensorInfo
from .files import Stamp, check_rows, opened, read_tensor
from .header import read_header


class SafetensorsFile(Checkpoint):
    """A safetensors file, its header checked when it is opened (`header.py`).

    Rows are read into a new tensor by `pread`: nothing stays mapped, and no descriptor open. A file that is replaced or written
    to after it was opened is refused when it is next read.

    Raises:
        CheckpointError: for a file that cannot be read, or whose header is not true.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = self._path = Path(path)
        with opened(self._path) as fd:
            self._stamp = Stamp.of(fd)
            self._header = read_header(fd, self._path)
        self.metadata = self._header.metadata

    def __iter__(self) -> Iterator[str]:
        return iter(self._header.slots)

    def __len__(self) -> int:
        return len(self._header.slots)

    def __contains__(self, name: object) -> bool:
        return name in self._header.slots

    def info(self, name: str) -> TensorInfo:
        slot = self._header.slots[name]
        return TensorInfo(slot.shape, slot.dtype, self._path)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        slot = self._header.slots[name]
        shape = check_rows(name, slot.shape, start, stop)
        skipped = start * torch.Size(slot.shape[1:]).numel() * slot.dtype.itemsize
        with opened(self._path, self._stamp) as fd:
            return read_tensor(fd, slot.start + skipped, shape, slot.dtype, self._path)

    def fingerprint(self) -> str:
        known = (self._path.name, self._stamp.size, self._stamp.changed, self._header.digest)
        return hashlib.sha256(repr(known).encode()).hexdigest()
