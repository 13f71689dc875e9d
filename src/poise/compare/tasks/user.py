"""A user's task: a Python file with three callables, `model()`, `batches(split)` and `loss(model, batch)`."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from poise.compare.tasks import Split

EVALUATION_LIMIT = 10_000  # batches; far above any held-out set worth waiting for, so more means without end


class UserTask:
    """The task in `path`.

    `batches(split)`, or `batches(split, seed)`, gives any iterable of batches for "train", "tune" and "report". A training
    iterable that ends is started again: the next epoch. The file may also set `unit`, the loss's, `fingerprint`, a string that
    changes with the data it reads, and `optimum`, the lowest loss there is.

    Raises:
        ValueError: if the file does not exist or lacks one of the three callables.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ValueError(f"task {str(path)!r}: no such file")
        self.path = path
        self.name = path.stem
        spec = importlib.util.spec_from_file_location(f"poise_task_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        self.module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        missing = [name for name in ("model", "batches", "loss") if not callable(getattr(self.module, name, None))]
        if missing:
            raise ValueError(f"task {str(path)!r} must define {', '.join(f'{name}()' for name in missing)}")
        self.unit = str(getattr(self.module, "unit", ""))
        self.optimum: float | None = getattr(self.module, "optimum", None)
        self.fingerprint = hashlib.sha256(path.read_bytes() + str(getattr(self.module, "fingerprint", "")).encode()).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        return UserTask, (self.path.absolute(),)  # a worker process reads the file itself

    def model(self) -> nn.Module:
        return self.module.model()

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self.module.loss(model, batch)

    def batches(self, split: Split, seed: int) -> Iterator[Any]:
        return self.epochs(seed) if split == "train" else self.held_out(split)

    def epoch(self, split: Split, seed: int) -> Iterator[Any]:
        seeded = "seed" in inspect.signature(self.module.batches).parameters
        return iter(self.module.batches(split, seed=seed) if seeded else self.module.batches(split))

    def epochs(self, seed: int) -> Iterator[Any]:
        """Training batches, drawn from a random state of their own.

        A method that draws noise from torch's global generator would otherwise shift the data of every later step, and runs
        of two methods with one seed would no longer be a pair.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            random = torch.get_rng_state()
        stream: Iterator[Any] = iter(())
        while True:
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(random)
                batch = next(stream, None)
                if batch is None:
                    stream = self.epoch("train", seed)
                    batch = next(stream, None)
                random = torch.get_rng_state()
            if batch is None:
                raise ValueError(f"task {str(self.path)!r}: batches('train') is empty")
            yield batch

    def held_out(self, split: Split) -> Iterator[Any]:
        count = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same batches for every seed: all runs are measured on one set
            batches = self.epoch(split, 0)
            for count, batch in enumerate(batches, start=1):
                if count > EVALUATION_LIMIT:
                    raise ValueError(f"task {str(self.path)!r}: batches({split!r}) gave over {EVALUATION_LIMIT} and must end")
                yield batch
        if count == 0:
            raise ValueError(f"task {str(self.path)!r}: batches({split!r}) is empty")
