"""Writing a folder of weights: streamed, whole or not there, taken up again where it was broken off."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .atomic import DiskError, put
from .casting import Caster, Nonfinite
from .config import config_for
from .errors import CheckpointError
from .journal import JOURNAL, Finished, Head
from .output import claimed, inside
from .planned import Planned, check_disk, readable, stored_tile
from .shards import Shard, plan_shards, write_shard
from .side_files import copy

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"


@dataclass(frozen=True)
class Written:
    """What is on the disk.

    Attributes:
        files: all of them, weights first.
        tensors: how many there are.
        bytes: of the files with weights.
        shards: how many files with weights there are.
        found: how many of them an earlier run had finished.
    """

    files: tuple[Path, ...]
    tensors: int
    bytes: int
    shards: int
    found: int


class Interrupted(KeyboardInterrupt):
    """Writing was broken off from outside; the same command goes on.

    Attributes:
        finished, shards: how many files with weights are finished, and how many there will be.
    """

    def __init__(self, out: Path, finished: int, shards: int) -> None:
        self.finished, self.shards = finished, shards
        kept = f"{finished} of {shards} shards are finished in {out}"
        super().__init__(f"interrupted; {kept}, the same command goes on from there")


def write(
    out: Path,
    planned: Sequence[Planned],
    rows: Callable[[Planned, int, int], Tensor],
    *,
    fingerprint: str,
    config: Mapping[str, Any] | None = None,
    side_files: Mapping[str, Path] = {},
    metadata: Mapping[str, str] = {"format": "pt"},
    max_shard_bytes: int = 5 * 10**9,
    tile_bytes: int = 32 * 2**20,
    whole: Callable[[Planned], bool] | None = None,
    fresh: bool = False,
    progress: Callable[[int, int], None] | None = None,
    nonfinite: Nonfinite | None = None,
) -> Written:
    """Write a folder as transformers reads it, a few rows at a time.

    Shards come first, then side files, the index (of several shards) and `config.json`: a folder without them is visibly not
    finished. Every file is written under a hidden name, forced to the disk and renamed; a shard is then noted in the folder's
    journal, and the same call goes on behind the last noted shard, however it was broken off. Killed or not, the folder ends up
    the same to the byte.

    Memory is what `rows` holds and one tile in its stored form, whatever the size of the model: see `planned_memory`.

    Args:
        out: the folder; made if it does not exist.
        planned: the tensors, which fill one shard after another in this order. Inside a shard the order is that of the
            safetensors library: wider dtypes first, then by name.
        rows: makes rows [start, stop) of a tensor's first dimension, in any dtype and on any device. They are cast (floating
            numbers to nearest, ties to even) and written at once. A 0-d tensor is one row of shape (), an empty one is not
            asked for. What an earlier run finished is not asked for either, so rows may not hang on rows made before.
        fingerprint: of everything that decides the result: inputs, recipe, version of the code.
        config: content of `config.json`, kept true by `config_for`.
        side_files: names relative to `out`, and what is copied there byte for byte.
        metadata: strings in the header of every shard.
        max_shard_bytes: a larger file is divided, as transformers divides.
        tile_bytes: of the float32 rows that are asked for at once; a single row may be more.
        whole: tensors that are asked for in one piece.
        fresh: start over: what an earlier run wrote in `out`, and whatever a loader would take for weights, is removed.
        progress: told the bytes that are done and those that there are in all.
        nonfinite: asked when rows hold NaN or infinity, whether that is as it should be, as where the inputs hold them too.

    Raises:
        ValueError, TypeError: arguments that cannot be, before anything is written.
        CheckpointError: `out` is of another run, in use or not writable; the disk is too small, or full; the tensors contradict
            the config; rows have NaN or infinity, or what the stored dtype has no place for. What was finished is kept.
        Interrupted: on Ctrl-C.
    """
    out = Path(out)
    if tile_bytes <= 0:
        raise ValueError(f"tile_bytes={tile_bytes} must be positive")
    shards = plan_shards(planned, max_shard_bytes, metadata)
    texts = _texts(planned, shards, config)
    _check_side_files(out, side_files, {JOURNAL, *(shard.name for shard in shards), *texts})
    head = Head(fingerprint, _digest(shards, texts), (*(shard.name for shard in shards), *side_files, *texts))
    with claimed(out, head, fresh) as journal:
        found = {
            shard.name: journal.finished[shard.name]
            for shard in shards
            if shard.name in journal.finished
            and journal.finished[shard.name].bytes == shard.nbytes
            and shard.is_at(out / shard.name)
        }
        total = sum(shard.nbytes for shard in shards)
        done = sum(entry.bytes for entry in found.values())
        check_disk(out, total - done)

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(done, total)

        try:
            journal.begin(head, found)
            advance(0)
            cast = Caster(max(stored_tile(tensor, tile_bytes) for tensor in planned), nonfinite)
            for shard in shards:
                if shard.name not in found:
                    path = out / shard.name
                    digest = write_shard(path, shard, rows, cast, tile_bytes=tile_bytes, whole=whole, advance=advance)
                    journal.add(Finished(shard.name, shard.nbytes, digest))
            journal.begin(head, {shard.name: journal.finished[shard.name] for shard in shards})  # in their order
            for name, source in side_files.items():
                copy(source, out / name)
            for name, text in texts.items():
                put(out / name, text)
        except KeyboardInterrupt as error:
            raise Interrupted(out, len(journal.finished), len(shards)) from error
        except DiskError as error:
            kept = f"{len(journal.finished)} of {len(shards)} shards are finished and kept"
            left = readable(total - sum(entry.bytes for entry in journal.finished.values()))
            cure = f"free {left}, then the same command goes on" if error.full else "mend this, then the same command goes on"
            what = "the disk is full" if error.full else f"cannot be written ({error.cause.strerror})"
            raise CheckpointError(f"{what}; {kept}", cure=cure, file=error.path) from error
    return Written(tuple(out / name for name in head.files), len(planned), total, len(shards), len(found))


def _texts(planned: Sequence[Planned], shards: Sequence[Shard], config: Mapping[str, Any] | None) -> dict[str, bytes]:
    """The files that are written last, in order."""
    texts: dict[str, bytes] = {}
    if len(shards) > 1:
        sizes = {"total_parameters": sum(t.numel for t in planned), "total_size": sum(t.nbytes for t in planned)}
        places = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
        texts[INDEX] = _json({"metadata": sizes, "weight_map": dict(sorted(places.items()))})
    if config is not None:
        texts[CONFIG] = _json(config_for(config, planned))
    return texts


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _digest(shards: Sequence[Shard], texts: Mapping[str, bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, content in [*((shard.name, shard.header) for shard in shards), *texts.items()]:
        digest.update(f"{name} {len(content)}\0".encode() + content)
    return digest.hexdigest()


def _check_side_files(out: Path, side_files: Mapping[str, Path], taken: set[str]) -> None:
    for name, source in side_files.items():
        if not inside(name) or name in taken:
            raise ValueError(f"side_files: {name!r} must be a name below the folder that nothing else has")
        if not source.is_file():
            raise CheckpointError("is not there to be copied", cure="restore it, or leave it out of side_files", file=source)
        if source.resolve().is_relative_to(out.resolve()):
            raise ValueError(f"side_files: {source} lies in out={out}: what is written there cannot come from there")
