"""What a result hangs on besides its settings: the code that made it, the versions and the machine."""

from __future__ import annotations

import hashlib
import inspect
import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch

import poise
from poise.catalog import Method


def environment() -> dict[str, Any]:
    """Versions and machine, as they stand in `results.json`."""
    return {
        "poise": poise.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def code(method: Method) -> str:
    """Digest of poise's sources and of the file that defines `method`.

    A finished run is only taken from the journal if its code is still the code: who edits a rule and compares again must not be
    shown yesterday's numbers.
    """
    digest = hashlib.sha256(package_code().encode())
    source = inspect.getsourcefile(inspect.unwrap(method.target))
    if source is not None and Path(source).is_file():
        digest.update(Path(source).read_bytes())
    digest.update(torch.__version__.encode())
    return digest.hexdigest()


@cache
def package_code() -> str:
    """Digest of every source file of poise."""
    root = Path(poise.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.suffix in (".py", ".cpp", ".h"):
            digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
