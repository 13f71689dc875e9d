"""What is finished of a folder of weights, in the folder itself, so that the same command can go on after it was killed.

    {"poise": 1, "fingerprint": ..., "plan": ..., "files": [...]}        what the result hangs on, and the names it will have
    {"shard": "model-00001-of-00003.safetensors", "bytes": ..., "blake2b": ...}        one line for each finished shard

A line is added when its shard is on the disk under its final name, so the journal may know too little but never too much. It
stays when all is done: the same command then finds nothing to do, and `altered` can tell whether the files are still those that
were written. It holds no time and no path, so that two runs of one command leave equal folders.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .atomic import append_line, put
from .errors import CheckpointError

JOURNAL = ".poise-journal"
VERSION = 1


@dataclass(frozen=True)
class Head:
    """What must be the same for a run to go on.

    Attributes:
        fingerprint: of everything that decides the values.
        plan: digest of names, shapes, dtypes, shards and config.
        files: that the run writes.
    """

    fingerprint: str
    plan: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Finished:
    """A shard on the disk."""

    shard: str
    bytes: int
    blake2b: str


class Journal:
    """The journal of `folder`.

    Attributes:
        head: None if there is no journal.
        finished: by name of the shard.

    Raises:
        CheckpointError: a file that is no journal.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL
        self.head: Head | None = None
        self.finished: dict[str, Finished] = {}
        if self.path.exists():
            # Without an end of line the last line is torn, and the shard it speaks of is made again.
            lines = self.path.read_bytes().split(b"\n")[:-1]
            try:
                self.head = _head(json.loads(lines[0]))
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise CheckpointError("is not a journal of poise", cure="--fresh starts over", file=self.path) from error
            for line in lines[1:]:
                try:
                    entry = Finished(**json.loads(line))
                except (ValueError, TypeError):
                    break  # a disk that lost a line may have lost those behind it
                self.finished[entry.shard] = entry

    def begin(self, head: Head, found: dict[str, Finished]) -> None:
        """Make this the journal's whole content, at once."""
        self.head, self.finished = head, dict(found)
        lines = [{"poise": VERSION, **asdict(head)}, *map(asdict, found.values())]
        put(self.path, "".join(f"{json.dumps(line)}\n" for line in lines).encode())

    def add(self, entry: Finished) -> None:
        """Note a shard that is on the disk under its final name."""
        append_line(self.path, json.dumps(asdict(entry)))
        self.finished[entry.shard] = entry


def _head(line: dict[str, Any]) -> Head:
    if line["poise"] != VERSION:
        raise ValueError(line["poise"])
    return Head(line["fingerprint"], line["plan"], tuple(line["files"]))


def checksum() -> hashlib.blake2b:
    """What tells a shard from any other, as far as anyone can tell."""
    return hashlib.blake2b(digest_size=32)


def altered(folder: Path) -> list[str]:
    """Shards of `folder` that are missing or not byte for byte those that were written. Reads all of them."""
    wrong: list[str] = []
    for entry in Journal(folder).finished.values():
        try:
            with (folder / entry.shard).open("rb") as file:
                digest = hashlib.file_digest(file, checksum).hexdigest()
        except OSError:
            digest = ""
        if digest != entry.blake2b:
            wrong.append(entry.shard)
    return wrong
