"""What every checkpoint is, wherever its weights lie: a lazy, ordered mapping of names to tensors."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is read.

    Attributes:
        shape, dtype: as stored.
        file: that it lies in; None for what is in memory.
    """

    shape: torch.Size
    dtype: torch.dtype
    file: Path | None = None

    @property
    def numel(self) -> int:
        return self.shape.numel()

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class Checkpoint(Mapping[str, Tensor]):
    """Names to tensors, in a fixed order. Names, shapes and dtypes cost no reading; `checkpoint[name]` reads one tensor.

    A tensor that is read is a new one on the CPU and belongs to the caller. A name that shares its tensor with another one
    (tied weights) is listed once, under the name that is stored; `ties` tells the other names.

    Attributes:
        path: file or directory; None for what is in memory.
        config: the content of `config.json`; empty where there is none.
        ties: other name -> stored name.
        side_files: of a directory, what is neither weights nor config: tokenizer, generation config, code, ...
        metadata: strings that the weights' own header carries.
        warnings: what is wrong with it and keeps nobody from reading it.
    """

    path: Path | None = None
    config: Mapping[str, Any] = {}
    ties: Mapping[str, str] = {}
    side_files: tuple[Path, ...] = ()
    metadata: Mapping[str, str] = {}
    warnings: tuple[CheckpointError, ...] = ()

    @abstractmethod
    def info(self, name: str) -> TensorInfo:
        """Shape, dtype and file of a tensor, without reading it. KeyError for an unknown name."""

    @abstractmethod
    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor's first dimension, reading no others. A 0-d tensor is one row of shape ()."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hex digest that changes when the checkpoint does, from headers, sizes and times of change; no tensor is read."""

    def __getitem__(self, name: str) -> Tensor:
        return self.rows(name, 0, count_rows(self.info(name).shape))

    def __contains__(self, name: object) -> bool:
        return any(name == known for known in self)

    @property
    def parameters(self) -> int:
        """Entries of all stored tensors, tied ones once."""
        return sum(self.info(name).numel for name in self)

    @property
    def nbytes(self) -> int:
        return sum(self.info(name).nbytes for name in self)


def count_rows(shape: torch.Size) -> int:
    return shape[0] if shape else 1


class StateDict(Checkpoint):
    """A dictionary of tensors, or a module's own, as a checkpoint. Tensors that are one and the same are stored once.

    What is given is not changed, and not kept from changing: the checkpoint shows the tensors as they are when it is asked.
    """

    def __init__(self, tensors: Mapping[str, Tensor] | torch.nn.Module, config: Mapping[str, Any] | None = None) -> None:
        found = tensors.state_dict() if isinstance(tensors, torch.nn.Module) else dict(tensors)
        if config is None:
            own: Any = getattr(tensors, "config", None)  # of a transformers model
            config = own.to_dict() if hasattr(own, "to_dict") else {}
        self.config: Mapping[str, Any] = dict(config or {})
        held: dict[Any, str] = {}
        self._tensors: dict[str, Tensor] = {}
        ties: dict[str, str] = {}
        self.ties: Mapping[str, str] = ties
        for name, tensor in found.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name!r}: a checkpoint holds tensors, not {type(tensor).__name__}")
            place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
            # An empty tensor has no place of its own, and a meta tensor none at all.
            key = place if tensor.numel() and tensor.device.type != "meta" else name
            if key in held:
                ties[name] = held[key]
            else:
                held[key] = name
                self._tensors[name] = tensor.detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(self._tensors[name].shape, self._tensors[name].dtype)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        tensor = self._tensors[name]
        taken = tensor[start:stop] if tensor.ndim else tensor
        return torch.empty(taken.shape, dtype=taken.dtype).copy_(taken)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in self._tensors.items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\0".encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
