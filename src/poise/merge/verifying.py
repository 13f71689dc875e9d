"""The last pass: what was written, opened again and held to the plan."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from poise.checkpoint import CheckpointError, count_rows
from poise.checkpoint.open import open_checkpoint
from poise.checkpoint.planned import Planned

AGAIN = 8  # tensors of which the first rows are merged a second time


def verify(
    out: Path,
    planned: Sequence[Planned],
    rows: Callable[[Planned, int, int], Tensor],
    tile_bytes: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """What is wrong with a folder that was written; empty if nothing is.

    Names, shapes and dtypes are those planned, every number is finite, `config.json` can be read, and of some tensors the first
    rows are merged again and are the same to the bit.
    """
    try:
        found = open_checkpoint(out)
    except CheckpointError as error:
        return [str(error)]
    wanted = {tensor.name: tensor for tensor in planned}
    broken = [f"{name}: not written" for name in wanted if name not in found]
    broken += [f"{name}: not planned" for name in found if name not in wanted]
    for tensor in planned:
        if tensor.name in found and (found.info(tensor.name).shape, found.info(tensor.name).dtype) != (
            tensor.shape,
            tensor.dtype,
        ):
            broken.append(f"{tensor.name}: {found.info(tensor.name)} where {tensor} was planned")
    if (out / "config.json").is_file():
        try:
            json.loads((out / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            broken.append(f"config.json: {error}")
    if broken:
        return broken
    again = {tensor.name for tensor in list(planned)[:: max(1, len(planned) // AGAIN)]}
    done, total = 0, sum(tensor.nbytes for tensor in planned)
    for tensor in planned:
        step = max(1, tile_bytes // max(1, 4 * tensor.shape[1:].numel()))
        for start in range(0, count_rows(tensor.shape), step):
            stop = min(start + step, count_rows(tensor.shape))
            read = found.rows(tensor.name, start, stop)
            if read.is_floating_point() and not bool(torch.isfinite(read).all()):
                broken.append(f"{tensor.name}: rows {start} to {stop - 1} are not all finite")
            if start == 0 and tensor.name in again and not torch.equal(read, rows(tensor, start, stop).to(tensor.dtype)):
                broken.append(f"{tensor.name}: rows {start} to {stop - 1} are not what merging gives")
            done += read.nbytes
            if progress is not None:
                progress(done, total)
    return broken
