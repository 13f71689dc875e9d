"""Many checkpoints to one, in four passes: plan, observe, write, verify.

Rows of all models are read a tile at a time, merged in float32, cast once and written; what a method must know of the whole it
observes before, a tile at a time too. Memory is some tiles for each model, whatever the models' size.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poise.checkpoint import heap
from poise.checkpoint.planned import check_disk
from poise.checkpoint.writing import write

from .adapters import Joined
from .merger import TILE, Merger, Progress
from .needs import needs
from .parents import Parent
from .verifying import verify


@dataclass(frozen=True)
class Merged:
    """What came of a merge.

    Attributes:
        tensors, copied: of the result; those of them that were copied, not merged.
        parameters, nbytes: of the result.
        shards, found: files with weights; those that an earlier run had finished.
        notes: where the recipe was understood differently from what its author may expect.
        broken: what verification found wrong; empty if the result is sound.
    """

    out: Path
    method: str
    models: tuple[str, ...]
    tensors: int
    copied: int
    parameters: int
    nbytes: int
    shards: int
    found: int
    seconds: float
    notes: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "out": str(self.out)}


def run(
    merger: Merger,
    out: str | Path,
    *,
    max_shard_bytes: int = 5 * 10**9,
    fresh: bool = False,
    progress: Progress | None = None,
) -> Merged:
    """Carry a recipe out: observe, write into the folder `out`, verify what was written.

    Broken off at any point, the same call goes on where it was; see `poise.checkpoint.write`.

    Raises:
        ValueError, CheckpointError: what the plan found; NaN in a model; what cannot be written.
    """
    begun, out = time.perf_counter(), Path(out)
    merger.plan.check()
    check_out(out, merger.parents)
    if merger.adapters is not None:
        return run_adapters(merger, merger.adapters, out, begun)
    planned, written = merger.planned, needs(merger).written
    check_disk(out, written - sum(f.stat().st_size for f in out.glob("*.safetensors")) if out.is_dir() else written)
    with heap.kept(), tempfile.TemporaryDirectory() as made:
        merger.observe(progress)
        kept = write(
            out,
            planned,
            merger.rows,
            fingerprint=merger.fingerprint(),
            config=merger.side_files.config(merger.plan.config),
            side_files=merger.side_files.files(Path(made)),
            max_shard_bytes=max_shard_bytes,
            tile_bytes=TILE,
            fresh=fresh,
            progress=None if progress is None else lambda done, total: progress("write", done, total),
        )
        said = None if progress is None else lambda done, total: progress("verify", done, total)
        broken = verify(out, planned, merger.rows, TILE, said)
    return Merged(
        out=out,
        method=merger.method.name,
        models=tuple(map(str, merger.parents)),
        tensors=len(planned),
        copied=sum(line.copied for line in merger.plan.lines),
        parameters=sum(tensor.numel for tensor in planned),
        nbytes=written,
        shards=kept.shards,
        found=kept.found,
        seconds=time.perf_counter() - begun,
        notes=tuple(merger.plan.notes + merger.side_files.notes),
        broken=tuple(broken),
    )


def run_adapters(merger: Merger, joined: Joined, out: Path, begun: float) -> Merged:
    tensors, parameters, nbytes = joined.write(out)
    return Merged(
        out=out,
        method=merger.method.name,
        models=tuple(map(str, merger.parents)),
        tensors=tensors,
        copied=0,
        parameters=parameters,
        nbytes=nbytes,
        shards=1,
        found=0,
        seconds=time.perf_counter() - begun,
        notes=tuple(merger.plan.notes + joined.notes),
        broken=tuple(joined.verify(out)),
    )


def check_out(out: Path, parents: Sequence[Parent]) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out}: must be a folder, and is a file")
    for parent in parents:
        path = parent.checkpoint.path
        if path is not None and out.resolve() in (path.resolve(), path.parent.resolve() if path.is_file() else None):
            raise ValueError(f"out={out}: lies where {parent} does, and would overwrite it")
