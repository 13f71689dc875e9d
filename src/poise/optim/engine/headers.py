"""The headers that all generated code begins with, parsed once and kept beside the kernels.

Reading them takes a compiler five times as long as the kernel itself. Parsing them for good takes as long as two kernels, so
the first kernel on a machine does not wait for it, and those after it do.
"""

from __future__ import annotations

import hashlib
import shlex
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

TEXT = "#include <vector>\n#include <torch/csrc/inductor/cpp_prefix.h>\n"


@dataclass
class _Parsing:
    """A header on its way; the process goes on by itself should this one end."""

    header: Path
    process: subprocess.Popen[bytes]


_lock = threading.Lock()
_started: dict[Path, _Parsing] = {}


def parsed(command: Sequence[str], folder: Path) -> Path | None:
    """The header to put before what `command` compiles (`-include`), or None: it is not there yet, or cannot be made.

    Args:
        command: how a kernel is compiled, "kernel.cpp" being its source.
        folder: where headers are kept.
    """
    about = _version(command[0])
    if "Free Software Foundation" not in about:  # other compilers keep parsed headers in other ways
        return None
    leave = {"kernel.cpp", "-shared", "-o", command[command.index("-o") + 1]}
    flags = [flag for flag in command if flag not in leave and not flag.startswith(("-l", "-L"))]
    said = "\n".join([torch.__version__, about, TEXT, *flags])
    header = folder / f"{hashlib.sha256(said.encode()).hexdigest()[:32]}.h"
    result = header.with_name(f"{header.name}.gch")
    if result.exists():
        return header
    with _lock:
        first = header not in _started
        if first:
            _started[header] = _Parsing(header, _parse(flags, header, result))
    if not first:
        _started[header].process.wait()
    return header if result.exists() else None


def wait() -> None:
    """Return when no header is being parsed: what is timed should have the machine for itself."""
    with _lock:
        parsing = list(_started.values())
    for one in parsing:
        one.process.wait()


def _parse(flags: Sequence[str], header: Path, result: Path) -> subprocess.Popen[bytes]:
    """Parse in the background, in a folder of its own; what is done is put in its place at once."""
    own = tempfile.mkdtemp(prefix="header-", dir=header.parent)
    Path(own, "prefix.h").write_text(TEXT)
    compile_it = shlex.join([*flags, "-x", "c++-header", "prefix.h", "-o", "prefix.gch"])
    put = f"mv prefix.h {shlex.quote(str(header))} && mv prefix.gch {shlex.quote(str(result))}"
    script = f"{compile_it} && {put}; cd / && rm -rf {shlex.quote(own)}"
    quiet = subprocess.DEVNULL
    return subprocess.Popen(["/bin/sh", "-c", script], cwd=own, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)


@cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
