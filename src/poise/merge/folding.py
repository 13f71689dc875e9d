"""A model with an adapter folded into it, read as if it had been written so."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

from torch import Tensor

from poise.checkpoint import Checkpoint, CheckpointError, TensorInfo, count_rows
from poise.checkpoint.lora import Full
from poise.checkpoint.peft_directory import PeftDirectory


class Folded(Checkpoint):
    """A checkpoint in which the weights that an adapter changes are the changed ones.

    Changed rows come in float32, or float64, whatever the file holds: rounding is left to whoever writes them.

    Raises:
        CheckpointError: if the adapter changes what the model does not have, or is of other shapes.
    """

    def __init__(self, model: Checkpoint, adapter: PeftDirectory) -> None:
        self.model, self.adapter = model, adapter
        self.path, self.config, self.ties = model.path, model.config, model.ties
        self.side_files, self.metadata = model.side_files, model.metadata
        self.updates = adapter.deltas()
        cure = f"the adapter is for another model than {model.path}"
        for name, update in self.updates.items():
            if name in model.ties:
                problem, mend = f"is tied to {model.ties[name]!r}", "fold it with peft's merge_and_unload() first"
                raise CheckpointError(problem, cure=mend, file=adapter.path, tensor=name)
            if name not in model:
                raise CheckpointError("the model has no such tensor", cure=cure, file=adapter.path, tensor=name)
            own, shape = model.info(name).shape, update.shape
            grown = isinstance(update, Full) and own[1:] == shape[1:] and name not in model.ties.values()
            if own != shape and not grown:
                problem = f"the adapter's change is {list(shape)}, the model's weight {list(own)}"
                raise CheckpointError(problem, cure=cure, file=adapter.path, tensor=name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.model)

    def __len__(self) -> int:
        return len(self.model)

    def __contains__(self, name: object) -> bool:
        return name in self.model

    def info(self, name: str) -> TensorInfo:
        found, update = self.model.info(name), self.updates.get(name)
        return found if update is None else TensorInfo(update.shape, found.dtype, found.file)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        update = self.updates.get(name)
        if update is None:
            return self.model.rows(name, start, stop)
        own = self.model.info(name).shape
        if update.whole:
            return update.applied(self.model[name])[start:stop]
        if own != update.shape:  # an embedding that grew is in the adapter whole, and the model's rows do not reach
            first = self.model.rows(name, 0, 1)
            return update.applied(first.expand(stop - start, *first.shape[1:]), start)
        return update.applied(self.model.rows(name, start, min(stop, count_rows(own))), start)

    def fingerprint(self) -> str:
        text = f"{self.model.fingerprint()} {self.adapter.fingerprint()} {json.dumps(dict(self.adapter.config))}"
        return hashlib.sha256(text.encode()).hexdigest()
