"""A GGUF file as a checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, TensorInfo
from ..errors import CheckpointError
from ..files import AGAIN, Stamp, check_rows, opened, read_tensor
from .header import Block, read_head
from .names import COMPUTED, FAMILIES, Family, heads, rename, rotation, to_config

# Entries made float32 at a time: what is in between takes some twenty bytes each.
STRIDE = 2**20


class GGUFFile(Checkpoint):
    """A GGUF file, its header checked when it is opened (`header.py`), its blocks made float32 as they are read (`blocks.py`).

    Tensors of a decoder of the Llama, Gemma or Qwen family have the names and the rows that transformers gives them, and
    `config` is what its `config.json` would say. Of another architecture they keep their own names, as `warnings` then tells.

    Attributes:
        fields: the file's metadata; of arrays with more than 1024 entries, only type and length.

    Raises:
        CheckpointError: for a file that cannot be read, whose header is not true, or with blocks of an unknown format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = self._path = Path(path)
        with opened(self._path) as fd:
            self._stamp = Stamp.of(fd)
            head = read_head(fd, self._path)
            self._digest = head.digest
        self.fields = head.metadata
        self.metadata: Mapping[str, str] = {k: v for k, v in self.fields.items() if isinstance(v, str)}
        self._family: Family | None = FAMILIES.get(self.metadata.get("general.architecture", ""))
        self._blocks: dict[str, Block] = dict(head.blocks)
        self._rename(head.blocks)

    def _rename(self, blocks: Mapping[str, Block]) -> None:
        architecture = self.fields.get("general.architecture")
        if self._family is None:
            known = ", ".join(FAMILIES)
            self._warn(f"has architecture {architecture!r:.80}: its tensors keep the names of GGUF", f"known are {known}")
            return
        unknown = next((n for n in blocks if n not in COMPUTED and rename(n, self._family) is None), None)
        if unknown is not None:
            self._family = None
            problem = f"transformers' {architecture} has no such tensor: all keep the names and rows of GGUF"
            self._warn(problem, "load it with the program it was written for", unknown)
            return
        self.config = to_config(self.fields, blocks, self._family)
        self._blocks = {rename(n, self._family) or n: block for n, block in blocks.items() if n not in COMPUTED}
        if len(self._blocks) < sum(n not in COMPUTED for n in blocks):
            raise CheckpointError("has two tensors for one name", cure=f"it is damaged or forged: {AGAIN}", file=self._path)
        cure = "set rope_scaling in the config to what it was trained with"
        for name in blocks:
            if name in COMPUTED:
                self._warn("holds factors of the rotation, which are not read", cure, name)
        if self.fields.get(f"{architecture}.rope.scaling.type", "none") != "none":
            self._warn("scales its rotation, which `config` does not say", cure)
        if self.config["tie_word_embeddings"] and "model.embed_tokens.weight" in self._blocks:
            self.ties = {"lm_head.weight": "model.embed_tokens.weight"}
        for name, block in self._blocks.items():
            if self._is_rotated(name):
                count = heads(self.config, name)
                if count < 1 or block.shape[0] % (2 * count):
                    problem = f"has {block.shape[0]} rows, which are no even number for each of {count} heads"
                    raise CheckpointError(problem, cure=f"it is damaged or forged: {AGAIN}", file=self._path, tensor=name)

    def _warn(self, problem: str, cure: str, tensor: str | None = None) -> None:
        self.warnings = (*self.warnings, CheckpointError(problem, cure=cure, file=self._path, tensor=tensor))

    def _is_rotated(self, name: str) -> bool:
        inside = name.endswith((".q_proj.weight", ".q_proj.bias", ".k_proj.weight", ".k_proj.bias"))
        return self._family is not None and self._family.rotated and inside and bool(self._blocks[name].shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, name: object) -> bool:
        return name in self._blocks

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype as they are read: the file itself holds fewer bytes."""
        block = self._blocks[name]
        return TensorInfo(block.shape, block.kind.dtype, self._path)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        block = self._blocks[name]
        shape = check_rows(name, block.shape, start, stop)
        if self._is_rotated(name):
            return self._rotated(name, block, start, stop)
        taken = self._decoded(block, start, stop, shape)
        if self._family is not None and self._family.shifted and name.endswith("norm.weight"):
            taken -= 1
        return taken

    def _rotated(self, name: str, block: Block, start: int, stop: int) -> Tensor:
        """Rows of whole heads are read, as many as the wanted ones lie in."""
        count = heads(self.config, name)
        width = block.shape[0] // count
        first, last = start // width, -(-stop // width)
        shape = torch.Size(((last - first) * width, *block.shape[1:]))
        found = self._decoded(block, first * width, last * width, shape)
        if start == stop:
            return found[:0]
        order = rotation(len(found), last - first)
        return found[order[start - first * width : stop - first * width]]

    def _decoded(self, block: Block, start: int, stop: int, shape: torch.Size) -> Tensor:
        """Rows as they lie in the file. A row of a vector may begin inside of a block."""
        row = torch.Size(block.shape[1:]).numel()
        out = torch.empty(shape, dtype=block.kind.dtype)
        flat = out.reshape(-1)
        done, end = start * row, stop * row
        with opened(self._path, self._stamp) as fd:
            while done < end:
                first = done // block.kind.entries
                last = min(-(-end // block.kind.entries), first + STRIDE // block.kind.entries)
                place = block.start + first * block.kind.nbytes
                raw = read_tensor(fd, place, torch.Size((last - first, block.kind.nbytes)), torch.uint8, self._path)
                found = block.kind.decode(raw).reshape(-1)[done - first * block.kind.entries :]
                taken = min(len(found), end - done)
                flat[done - start * row : done - start * row + taken] = found[:taken]
                done += taken
        return out

    def fingerprint(self) -> str:
        known = (self._stamp.size, self._stamp.changed, self._digest)
        return hashlib.sha256(repr((self._path.name, *known)).encode()).hexdigest()
