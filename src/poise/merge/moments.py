"""Adam's second moments beside a checkpoint: saved from an optimizer, whole or as two vectors a matrix, and read by rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from poise.checkpoint import Checkpoint, CheckpointError, TensorInfo

Form = Literal["full", "rank1"]
ROW, COLUMN = ".exp_avg_sq_row", ".exp_avg_sq_col"


def save_second_moments(
    optimizer: torch.optim.Optimizer, model: nn.Module, path: str | Path, *, form: Form = "full"
) -> list[str]:
    """Write `exp_avg_sq` of every parameter that has one, under the model's names, as safetensors. Returns the names.

        v ~ (row sums)(column sums) / total,    of matrices, for form="rank1"

    Args:
        optimizer: poise's, also inside a driver and in every state format, or torch's: whatever keeps `exp_avg_sq` in its
            state, or Adafactor's two factors.
        model: whose names they get; a parameter with two names gets the first.
        form: "full" (default), or "rank1": d_out + d_in values in place of d_out d_in, exact where v is an outer product.

    Raises:
        ValueError: no parameter of the model has second moments.
    """
    if form not in ("full", "rank1"):
        raise ValueError(f"form={form!r}: must be 'full' or 'rank1'")
    tensors: dict[str, Tensor] = {}
    state_of = _reader(optimizer)
    for name, p in model.named_parameters():
        state = state_of(p)
        if "exp_avg_sq_row" in state:
            v = _joined(state["exp_avg_sq_row"].double(), state["exp_avg_sq_col"].double()).reshape(p.shape).float()
        elif "exp_avg_sq" in state:
            v = state["exp_avg_sq"].detach().float()
        else:
            continue
        v = v.cpu()
        if form == "rank1" and v.ndim == 2:
            rows, columns = rank_one(v)
            tensors[name + ROW], tensors[name + COLUMN] = rows.float(), columns.float()
        else:
            tensors[name] = v.contiguous().clone()
    if not tensors:
        raise ValueError("optimizer: it keeps no exp_avg_sq of any parameter of this model; train with AdamW, and take a step")
    save_file(tensors, str(path), metadata={"format": "pt", "holds": "exp_avg_sq"})
    return [name for name, p in model.named_parameters() if name in tensors or name + ROW in tensors]


def rank_one(v: Tensor) -> tuple[Tensor, Tensor]:
    """Two vectors whose outer product has the row and column sums of the matrix: (row sums, column sums / total), float64."""
    rows, columns = v.double().sum(1), v.double().sum(0)
    total = columns.sum()
    return rows, columns / total if total > 0 else torch.zeros_like(columns)


def _joined(rows: Tensor, columns: Tensor) -> Tensor:
    """Adafactor's factors are means: the product over the mean of one."""
    mean = rows.mean(-2, keepdim=True)
    return rows * columns / torch.where(mean > 0, mean, 1)


def _reader(optimizer: torch.optim.Optimizer) -> Callable[[Tensor], Mapping[str, Any]]:
    """Gives the state of a parameter, {} for one that is not the optimizer's. poise's own reads it from its format."""
    inside: Any = getattr(optimizer, "base", optimizer)  # of a driver, the innermost
    held = {id(p) for group in inside.param_groups for p in group["params"]}
    read: Callable[[Tensor], Mapping[str, Any]] = getattr(inside, "values", lambda p: inside.state.get(p, {}))
    return lambda p: read(p) if id(p) in held else {}


class SecondMoments(Checkpoint):
    """What `save_second_moments` wrote, or any safetensors file with the model's names, as a checkpoint that is read by rows.

    Names may end in `.exp_avg_sq`. Matrices kept as two vectors are multiplied out a few rows at a time.

    Raises:
        CheckpointError: the file cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._file: Any = safe_open(str(path), framework="pt")
        except Exception as error:
            raise CheckpointError(
                f"cannot be read: {error}", file=path, cure="give a file that save_second_moments wrote"
            ) from error
        self._names: dict[str, str] = {}
        for key in sorted(self._file.keys()):
            if not key.endswith(COLUMN):
                self._names[key.removesuffix(ROW).removesuffix(".exp_avg_sq")] = key

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def info(self, name: str) -> TensorInfo:
        key = self._names[name]
        shape = list(self._file.get_slice(key).get_shape())
        if key.endswith(ROW):
            shape += self._file.get_slice(name + COLUMN).get_shape()
        return TensorInfo(torch.Size(shape), torch.float32, self.path)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        key = self._names[name]
        taken = self._file.get_slice(key)
        if not taken.get_shape():
            return self._file.get_tensor(key)
        if key.endswith(ROW):
            return taken[start:stop][:, None] * self._file.get_tensor(name + COLUMN)
        return taken[start:stop]

    def fingerprint(self) -> str:
        assert self.path is not None
        stat = self.path.stat()
        return f"{self.path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
