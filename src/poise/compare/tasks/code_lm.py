"""`code-lm`: next-byte prediction on the Python standard library's own sources, which every interpreter carries."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poise.compare.tasks import Split
from poise.models import GPT, GPTConfig

CORPUS_BYTES = 8_000_000  # enough that a run never reads a byte twice, and read in a moment
EVALUATION_WINDOWS = {"tune": 256, "report": 512}
EVALUATION_BATCH = 32

# Installed packages are not the standard library; tests are not what people write; the rest are tables of characters, not code.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
# Written when the interpreter was built: they differ between machines that run the same Python.
BUILD_RECORDS = ("_sysconfigdata", "config-")


class Task:
    """A byte-level language model of Python code. Loss in nats per byte; the order-0 entropy of the corpus is about 3.1.

    Args:
        root: folder whose `.py` files are the corpus; by default the running interpreter's standard library.
        name: one for each size, since results of different models are not of one task.
        width, layers: of the model.
        batch_size, context: a batch is `(batch_size, context + 1)` bytes: inputs and, one to the right, targets.
    """

    unit = "nats per byte"

    def __init__(
        self,
        root: Path | None = None,
        batch_size: int = 8,
        context: int = 64,
        *,
        name: str = "code-lm",
        width: int = 128,
        layers: int = 2,
    ) -> None:
        self.name, self.width, self.layers = name, width, layers
        self.root = root or Path(sysconfig.get_path("stdlib"))
        self.batch_size = batch_size
        self.context = context
        self.files = corpus(self.root)
        self.fingerprint = digest(self.files)

    @cached_property
    def data(self) -> dict[Split, np.ndarray]:
        """Each split's files, one after another, a zero byte between them."""
        parts: dict[Split, list[bytes]] = {"train": [], "tune": [], "report": []}
        for path, source in self.files.items():
            parts[split_of(path)].append(source)
        data: dict[Split, np.ndarray] = {s: np.frombuffer(b"\0".join(part), dtype=np.uint8) for s, part in parts.items()}
        for split, stream in data.items():
            if len(stream) <= self.context + 1:
                raise ValueError(f"{self.root} holds too little Python for code-lm: {len(stream)} bytes in split {split!r}")
        return data

    def model(self) -> nn.Module:
        # Llama's 0.02 is made for thousands of channels; a short run would spend much of itself on growing the weights.
        config = GPTConfig(
            hidden_size=self.width,
            intermediate_size=self.width * 43 // 16,  # 8/3, in multiples of 8
            num_hidden_layers=self.layers,
            max_position_embeddings=self.context,
            initializer_range=self.width**-0.5,
        )
        return GPT(config)

    def batches(self, split: Split, seed: int) -> Iterator[Tensor]:
        stream = self.data[split]
        windows = np.lib.stride_tricks.sliding_window_view(stream, self.context + 1)
        if split == "train":
            for step in range(2**63):
                # Keyed by the step, so that a batch does not depend on how many were drawn before it.
                starts = np.random.default_rng((seed, step)).integers(len(windows), size=self.batch_size)
                yield torch.from_numpy(windows[starts].astype(np.int64))
        else:
            starts = np.linspace(0, len(windows) - 1, EVALUATION_WINDOWS[split]).astype(np.int64)
            for some in np.split(starts, len(starts) // EVALUATION_BATCH):
                yield torch.from_numpy(windows[some].astype(np.int64))

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        logits = model(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def small() -> Task:
    """A quarter of the matrices' entries, in half as many blocks."""
    return Task(name="code-lm-small", width=64, layers=1)


def large() -> Task:
    """Four times the matrices' entries, in twice as many blocks."""
    return Task(name="code-lm-large", width=256, layers=4)


def corpus(root: Path) -> dict[str, bytes]:
    """Relative path -> source, about `CORPUS_BYTES` in all, chosen by a hash of the path: the same for the same Python."""
    chosen: dict[str, bytes] = {}
    total = 0
    for path in sorted(sources(root), key=lambda path: unit_hash("choice", path)):
        if total >= CORPUS_BYTES:
            break
        chosen[path] = (root / path).read_bytes()
        total += len(chosen[path])
    return dict(sorted(chosen.items()))


def digest(files: Mapping[str, bytes]) -> str:
    """SHA-256 over paths and contents, in the order of the paths."""
    whole = hashlib.sha256()
    for path, source in sorted(files.items()):
        whole.update(f"{path}\0{len(source)}\0".encode())
        whole.update(source)
    return whole.hexdigest()


def sources(root: Path) -> list[str]:
    """Relative POSIX paths of the corpus's `.py` files under `root`."""
    found = []
    for folder, inner, files in os.walk(root):
        inner[:] = [name for name in inner if name not in SKIPPED_FOLDERS and not name.startswith(BUILD_RECORDS)]
        names = [name for name in files if name.endswith(".py") and not name.startswith(BUILD_RECORDS)]
        found += [Path(folder, name).relative_to(root).as_posix() for name in names]
    return found


def split_of(path: str) -> Split:
    """Which split a file belongs to: a matter of its path alone, so that no file ever moves when others come or go."""
    place = unit_hash("split", path)
    return "train" if place < 0.90 else "tune" if place < 0.95 else "report"


def unit_hash(purpose: str, path: str) -> float:
    """A number in [0, 1) from a path. `purpose` keeps two uses of it independent."""
    return int.from_bytes(hashlib.sha256(f"{purpose}\0{path}".encode()).digest()[:6], "big") / 2**48
