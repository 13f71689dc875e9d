"""Plain tensor math -> one native function over a tile, compiled once and kept on disk.

`native(fn, args)` traces `fn` with a dynamic leading size, lets inductor generate its single-thread vector kernel, and wraps
that in one C entry point `void poise_run(char** pointers, int64_t n, int64_t length)` which the tile driver calls; `length` are
the elements of a block, where the rule sees blocks. The machine code is found again under the traced graph's hash, so a warm
start neither lowers nor compiles.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import headers
from .inductor import Arg, Unsupported, source_of, trace

VERSION = 9  # of what is kept on disk


@dataclass(frozen=True)
class Kernel:
    """A compiled function: `address` of `void(char** pointers, int64_t n, int64_t length)`, pointers in the order of `args`."""

    address: int
    args: tuple[Arg, ...]


def compiler() -> str | None:
    """The C++ compiler's path, from CXX ("g++", "ccache g++") or the usual names; None where there is none."""
    named = shlex.split(os.environ.get("CXX", ""))
    candidates = named[::-1] if named else ["g++", "clang++", "c++"]
    return next((path for path in map(shutil.which, candidates) if path), None)


def cache_dir() -> Path:
    """Where compiled kernels are kept: beside inductor's own, so that emptying its cache empties this one."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir as inductor_cache_dir

    path = Path(inductor_cache_dir()) / "poise"
    path.mkdir(parents=True, exist_ok=True)
    return path


@cache
def find_vectors() -> None:
    """Let inductor find out, once, which vector instructions there are.

    It does so by compiling something in its cache. Where the folder's name has a space in it, that fails, and every kernel of
    this process would do without: the trial is then made elsewhere.
    """
    if shlex.quote(str(cache_dir())) == str(cache_dir()):
        _try_vectors()
        return
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[name] = folder
        try:
            _try_vectors()
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before


def _try_vectors() -> None:
    """Inductor tries all that the processor has, some seconds each; where the best works, so do those that came before it."""
    from torch._inductor import config, cpu_vec_isa

    there = set(cpu_vec_isa.x86_isa_checker())
    best = next((isa for isa in cpu_vec_isa.supported_vec_isa_list if set(str(isa).split()) <= there), None)
    with config.patch({"cpp.vec_isa_ok": True}) if best else nullcontext():
        cpu_vec_isa.pick_vec_isa()


_loaded: dict[str, Future[Kernel]] = {}
_known: dict[Any, str] = {}  # keys of functions that said what they are
_lock = threading.RLock()  # tracing and lowering use process-wide state of torch
_pool = ThreadPoolExecutor(max_workers=max(2, (os.cpu_count() or 2)), thread_name_prefix="poise-compile")


def in_background(work: Callable[[], Any]) -> Future[Any]:
    """Do something while kernels compile."""
    return _pool.submit(work)


def compiled_count() -> int:
    """How many native kernels this process has asked for so far: constant while a schedule runs."""
    return len(_loaded)


def native(fn: Callable[..., dict[str, Tensor]], args: Sequence[Arg], known: Hashable = None) -> Future[Kernel]:
    """The kernel of `fn(**tensors) -> {written name: new value}`; compiled in the background where it is not on disk.

    Args:
        known: what says all about `fn`, if something does; the next one like it is then found without tracing it.

    Raises:
        Unsupported: (also from the future's result) when it cannot be made.
    """
    if compiler() is None:
        raise Unsupported("no C++ compiler found (CXX, g++, clang++, c++)")
    name = (known, tuple(args), str(cache_dir()), torch.get_default_dtype())
    with _lock:
        if known is not None and _known.get(name) in _loaded:
            return _loaded[_known[name]]
        try:
            graph = trace(fn, args)
        except Unsupported:
            raise
        except Exception as error:
            raise Unsupported(f"tracing failed: {error}") from error
        key = _key(graph, args)
        if key not in _loaded:
            path = cache_dir() / f"{key}.so"
            if path.exists():
                _loaded[key] = Future()
                _loaded[key].set_result(_load(path, tuple(args)))
            else:
                find_vectors()
                source = source_of(fn, args, compiler())
                _loaded[key] = _pool.submit(_build, source, path, tuple(args))
        if known is not None:
            _known[name] = key
        return _loaded[key]


def _key(graph: torch.fx.GraphModule, args: Sequence[Arg]) -> str:
    if any(node.op == "get_attr" for node in graph.graph.nodes):
        raise Unsupported("tensor constants in compiled math: pass them as arguments or compute them")
    capability = torch.backends.cpu.get_cpu_capability()
    text = "\n".join([str(VERSION), torch.__version__, capability, str(compiler()), repr(tuple(args)), graph.code])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _build(source: str, path: Path, args: tuple[Arg, ...]) -> Kernel:
    from torch._inductor import config
    from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    with _lock, config.patch({"cpp.cxx": (None, compiler())}):
        options = CppTorchOptions(vec_isa=pick_vec_isa(), include_pytorch=False)

    def command(cpp: str, folder: str) -> list[str]:
        return shlex.split(CppBuilder(name="kernel", sources=cpp, BuildOption=options, output_dir=folder).get_command_line())

    header = headers.parsed(command("kernel.cpp", "."), path.parent)
    included = [] if header is None else ["-include", str(header)]
    build(source, path, lambda cpp, folder: [*command(cpp, folder), *included])
    return _load(path, args)


def build(source: str, path: Path, command: Callable[[str, str], list[str]]) -> None:
    """Compile `source` into the shared library `path`, atomically: two processes may do so at once.

    `command(cpp, folder)` is run inside a folder of its own, so that its names are plain wherever the cache is.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        (Path(folder) / "kernel.cpp").write_text(source)
        done = subprocess.run(command("kernel.cpp", "."), capture_output=True, text=True, cwd=folder, check=False)
        output = Path(folder) / "kernel.so"
        if done.returncode != 0 or not output.exists():
            raise Unsupported(f"the C++ compiler failed: {done.stderr[-2000:]}")
        os.replace(output, path)


def _load(path: Path, args: tuple[Arg, ...]) -> Kernel:
    library = ctypes.CDLL(str(path))
    address = ctypes.cast(library.poise_run, ctypes.c_void_p).value
    assert address is not None
    _libraries.append(library)
    return Kernel(address, args)


_libraries: list[ctypes.CDLL] = []  # a library must outlive the addresses taken from it


def wait(kernels: Iterable[Future[Kernel]]) -> list[Kernel]:
    """The finished kernels, in order."""
    return [kernel.result() for kernel in kernels]
