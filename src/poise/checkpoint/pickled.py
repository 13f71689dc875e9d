"""Weights in a file of torch.save, which is a pickle: read only as far as no code of it is run."""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import Checkpoint, StateDict, TensorInfo
from .errors import CheckpointError
from .files import AGAIN, Stamp, check_rows, opened, read_bytes

# torch.save writes zip archives. Before torch 1.6 it wrote pickles that begin with a number of its own.
ZIP, OLD = b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9"


class PickledFile(Checkpoint):
    """A state dict that torch.save wrote, such as `pytorch_model.bin`.

    torch's restricted unpickler builds tensors and plain containers and nothing else; a file that asks for more is refused,
    and nothing of it is run. Tensors stay in the file, which is mapped as long as the checkpoint lives, and are copied when
    they are read; only a file from before torch 1.6, which cannot be mapped, is in memory whole. Tensors that share their bytes
    are stored once, and `ties` names the others.

    Raises:
        CheckpointError: for a file with code in it, that is damaged, or that holds anything but a dictionary of names and dense
            tensors.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = self._path = Path(path)
        with opened(self._path) as fd:
            self._stamp = Stamp.of(fd)
            mapped = read_bytes(fd, 0, min(len(ZIP), self._stamp.size), self._path) == ZIP
        if self._path.suffix == ".safetensors":  # torch.load goes by it
            raise CheckpointError("is pickled, whatever its name says", cure="rename it to .bin", file=self._path)
        self._state = StateDict(_checked(_load(self._path, mapped), self._stamp.size, self._path), config={})
        self.ties = self._state.ties

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)

    def __contains__(self, name: object) -> bool:
        return name in self._state

    def info(self, name: str) -> TensorInfo:
        found = self._state.info(name)
        return TensorInfo(found.shape, found.dtype, self._path)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        check_rows(name, self.info(name).shape, start, stop)
        # A mapped file that has become shorter would end the process.
        with opened(self._path, self._stamp):
            return self._state.rows(name, start, stop)

    def fingerprint(self) -> str:
        known = [self._path.name, self._stamp.size, self._stamp.changed]
        known += [f"{name} {tuple(self.info(name).shape)} {self.info(name).dtype}" for name in self]
        return hashlib.sha256(repr(known).encode()).hexdigest()


def _load(path: Path, mapped: bool) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of deprecated kinds of storage
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f" (it asks for {asked[1]})" if asked else ""
        problem = f"holds more than tensors{reason}; reading it could run code, so it was not read"
        cure = "get the weights as safetensors, or, if you trust its author, load it yourself and save its state_dict"
        raise CheckpointError(problem, cure=cure, file=path) from None
    except MemoryError:
        raise CheckpointError("asks for more memory than there is", cure=f"it is damaged: {AGAIN}", file=path) from None
    except Exception as error:
        # Whatever a damaged archive makes torch raise, it is the archive's fault.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        problem = f"cannot be read by torch ({reason:.300})"
        raise CheckpointError(problem, cure=f"it was cut off or damaged: {AGAIN}", file=path) from None


def _checked(found: object, size: int, path: Path) -> dict[str, Tensor]:
    if not isinstance(found, dict):
        cure = "save the state_dict of the model, and nothing around it"
        raise CheckpointError(f"holds {type(found).__name__}, not a state dict", cure=cure, file=path)
    tensors: dict[str, Tensor] = {}
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            inner = sorted(str(key) for key in found if isinstance(found[key], dict))[:5]
            hint = f", perhaps the one under {inner[0]!r}" if inner else ""
            problem = f"holds {type(tensor).__name__} under {name!r:.80}, and a state dict holds tensors only"
            cure = f"load it with torch.load(weights_only=True) and give the state dict in it to open_checkpoint{hint}"
            raise CheckpointError(problem, cure=cure, file=path)
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            problem = f"is {tensor.layout}, {tensor.dtype} on {tensor.device}, not a dense tensor"
            raise CheckpointError(problem, cure="save it dense", file=path, tensor=name)
        # Strides of zero let a file of a few bytes claim a tensor of any size.
        if tensor.numel() * tensor.dtype.itemsize > size:
            problem = f"of shape {list(tensor.shape)} takes more bytes than the file has"
            cure = f"it was expanded, or is forged: save it contiguous, or {AGAIN}"
            raise CheckpointError(problem, cure=cure, file=path, tensor=name)
        tensors[name] = tensor.detach()
    return tensors
