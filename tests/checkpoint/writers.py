"""Writers that are killed, one way or another, and what may be seen of a folder while they live."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poise.checkpoint import Planned, Written, altered, planned_memory, write
from poise.checkpoint.journal import JOURNAL

DEAD = 9
CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 8, "vocab_size": 24, "dtype": "float32"}


def plan(count: int = 6, dtype: torch.dtype = torch.bfloat16) -> list[Planned]:
    """An embedding and blocks, of 384 bytes each in two-byte dtypes."""
    names = ["model.embed_tokens.weight", *(f"model.layers.{n}.mlp.up_proj.weight" for n in range(count - 1))]
    return [Planned(name, torch.Size([24, 8]), dtype) for name in names]


def value(tensor: Planned) -> Tensor:
    """The whole of a tensor, in float32: a function of its name."""
    generator = torch.Generator().manual_seed(sum(tensor.name.encode()))
    return torch.randn(tensor.shape, generator=generator)


def made(tensor: Planned, start: int, stop: int) -> Tensor:
    return value(tensor)[start:stop] if tensor.shape else value(tensor)


class Counting:
    """Rows, and how often each tensor was asked for; the call with number `last` fails."""

    def __init__(self, last: int = -1, error: BaseException | None = None) -> None:
        self.asked: list[str] = []
        self.last, self.error = last, error

    def __call__(self, tensor: Planned, start: int, stop: int) -> Tensor:
        self.asked.append(tensor.name)
        if len(self.asked) == self.last and self.error is not None:
            raise self.error
        return made(tensor, start, stop)


def written(out: Path, rows: Callable[[Planned, int, int], Tensor] = made, **other: Any) -> Written:
    """Three shards of two tensors, three tiles each, with a config and a side file."""
    side = out.parent / "tokenizer.json"
    if not side.exists():
        side.write_text('{"version": "1.0"}')
    settings: dict[str, Any] = dict(fingerprint="one", config=CONFIG, side_files={"tokenizer.json": side})
    settings |= dict(max_shard_bytes=800, tile_bytes=8 * 8 * 4)
    return write(out, other.pop("planned", plan()), rows, **(settings | other))


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too."""
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def broken(out: Path) -> list[str]:
    """Files under a final name that are not whole."""
    wrong: list[str] = []
    for path in out.glob("[!.]*"):
        data = path.read_bytes()
        try:
            if path.suffix == ".safetensors":
                start = 8 + int.from_bytes(data[:8], "little")
                ends = [e["data_offsets"][1] for n, e in json.loads(data[8:start]).items() if n != "__metadata__"]
                assert len(data) == start + max(ends)
                assert any(data[-64:])
            else:
                json.loads(data)
        except (ValueError, AssertionError):
            wrong.append(path.name)
    return wrong


class Dying:
    """System calls that write, counted; at the one with number `last` the process is gone, and nothing cleans up after it.

    With `power` the machine is gone too. What was not forced to the disk is then lost: of bytes the second half, of new names
    all. Nothing is really forced, which would only take time.
    """

    def __init__(self, last: int, power: bool) -> None:
        self.count, self.last, self.power = 0, last, power
        self.paths: dict[int, str] = {}
        self.sizes: dict[str, list[int]] = {}  # written, and forced to the disk
        self.renamed: list[tuple[str, str, bytes | None]] = []
        self.real = {name: getattr(os, name) for name in ("open", "write", "fsync", "close", "replace", "unlink")}
        for name in self.real:
            setattr(os, name, self.counted(name))

    def counted(self, name: str) -> Callable[..., Any]:
        real, noted = self.real[name], getattr(self, f"note_{name}")

        def call(*arguments: Any, **named: Any) -> Any:
            self.count += 1
            if self.count == self.last:
                self.die(name, arguments)
            if name == "replace":
                noted(None, *map(os.fspath, arguments))
            found = None if name == "fsync" else real(*arguments, **named)
            if name != "replace":
                noted(found, *arguments)
            return found

        return call

    def note_open(self, file: int, path: Any, *_: Any) -> None:
        self.paths[file] = os.fspath(path)
        if not os.path.isdir(path):
            size = os.path.getsize(path)
            self.sizes.setdefault(os.fspath(path), [size, size])[0] = size

    def note_write(self, count: int, file: int, _: Any) -> None:
        self.sizes[self.paths[file]][0] += count

    def note_fsync(self, _: Any, file: int) -> None:
        if os.path.isdir(self.paths[file]):
            self.renamed.clear()
        else:
            self.sizes[self.paths[file]][1] = self.sizes[self.paths[file]][0]

    def note_close(self, *_: Any) -> None: ...

    def note_replace(self, _: Any, source: str, path: str) -> None:
        before = Path(path).read_bytes() if os.path.exists(path) else None
        if not path.endswith(JOURNAL):  # of two new names a disk may keep the second, which is worse than none
            self.renamed.append((source, path, before))
        self.sizes[path] = self.sizes.pop(source)

    def note_unlink(self, _: Any, path: Any) -> None:
        self.sizes.pop(os.fspath(path), None)

    def die(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name == "write":  # half of it went through
            file, data = arguments
            self.note_write(self.real["write"](file, data[: len(data) // 2]), file, None)
        if self.power:
            for path, (size, forced) in self.sizes.items():
                if size > forced and os.path.exists(path):
                    os.truncate(path, (size + forced) // 2)
            for source, path, before in reversed(self.renamed):
                self.real["replace"](path, source)
                if before is not None:
                    Path(path).write_bytes(before)
        os._exit(DEAD)


def deaths(folder: Path, power: bool) -> dict[str, Any]:
    """Write a folder once for each system call, dying there, and once more; what was seen."""
    write_two = partial(written, planned=plan(3), tile_bytes=12 * 8 * 4)
    whole = folder / "whole"
    write_two(whole)
    seen: dict[str, Any] = {"deaths": 0, "broken": [], "different": []}
    while True:
        number = seen["deaths"] + 1
        out = folder / str(number)
        pid = os.fork()
        if not pid:
            Dying(number, power)
            try:
                write_two(out)
                os._exit(0)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code == 0:
            return seen
        assert code == DEAD
        seen["deaths"] += 1
        if out.exists():
            seen["broken"] += [f"{number}: {name}" for name in {*broken(out), *altered(out)}]
        write_two(out)
        if contents(out) != contents(whole):
            seen["different"].append(number)


def slowly(out: Path, shards: int, seconds: float) -> None:
    """Write, waiting at all rows, and say when a shard is begun."""

    def rows(tensor: Planned, start: int, stop: int) -> Tensor:
        if start == 0 and tensor in planned[::2]:
            print("begun", flush=True)
        time.sleep(seconds)
        return made(tensor, start, stop)

    planned = plan(2 * shards)
    written(out, rows, planned=planned)


def growth(out: Path, tensors: int, megabytes: int, tile_bytes: int, **other: Any) -> dict[str, int]:
    """Write tensors of so many MB in bfloat16, one a shard, made as they are asked for; MB of anonymous memory that it took."""
    shape = torch.Size([megabytes * 512, 1024])
    planned = [Planned(f"layers.{n}.weight", shape, torch.bfloat16) for n in range(tensors)]
    written(out.with_name("first"))  # imports, pools of the allocator and the like
    most = 0

    def anonymous() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))

    def rows(tensor: Planned, start: int, stop: int) -> Tensor:
        return torch.full((stop - start, 1024), 0.5)

    def watch() -> None:
        nonlocal most
        while not over.wait(0.002):
            most = max(most, anonymous())

    before = anonymous()
    over = threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    whole = write(out, planned, rows, fingerprint="one", max_shard_bytes=1, tile_bytes=tile_bytes, **other)
    over.set()
    watcher.join()
    return {"grew": most - before, "planned": planned_memory(planned, tile_bytes), "bytes": whole.bytes}


def serve() -> None:
    """For each line of input fork a child, which says its id; when it has ended say its status.

    So the seconds of importing torch are spent once.
    """
    torch.set_num_threads(1)
    os.fsync = lambda file: None
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if not pid:
            print(os.getpid(), flush=True)
            code = 1
            try:
                found = globals()[request.pop("do")](Path(request.pop("out")), **request)
                print(json.dumps(found), flush=True)
                code = 0
            finally:
                os._exit(code)
        print(os.waitpid(pid, 0)[1], flush=True)


class Forks:
    """The other side of `serve`."""

    def __init__(self) -> None:
        path = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        start = [sys.executable, "-c", "from checkpoint.writers import serve; serve()"]
        self.process = subprocess.Popen(start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=path)

    def begin(self, do: str, out: Path, **arguments: Any) -> int:
        """Id of a process that does it."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, "out": str(out), **arguments}) + "\n")
        self.process.stdin.flush()
        return int(self.line())

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def run(self, do: str, out: Path, **arguments: Any) -> Any:
        """What it found."""
        self.begin(do, out, **arguments)
        found = self.line()
        assert found != "256", "it failed"
        assert self.line() == "0"
        return json.loads(found)

    def end(self) -> None:
        self.process.communicate()
