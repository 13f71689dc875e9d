"""The peak of memory over real training steps, measured from outside, in a process of its own.

On a CPU it is the anonymous memory of the process above what it held before the model was made: the operating system's own
count of what cannot be dropped, so that nothing is forgotten, least of all what libraries allocate for themselves. On a GPU it
is torch's count of allocated bytes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.001  # seconds between two looks


@dataclass(frozen=True)
class Peak:
    """Bytes above the baseline, and of it what stays between steps; `failed` says why there is no figure."""

    peak: int | None
    between: int | None
    failed: str | None = None


def available() -> int | None:
    """Bytes of memory that this machine could still give; None where it does not say."""
    facts = Path("/proc/meminfo")
    if not facts.exists():
        return None
    for line in facts.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def measure(arguments: Sequence[str], limit: float = 600.0) -> Peak:
    """Run `python -m poise.compare.needs.child ARGUMENTS` and watch it; see that module for what it is told."""
    with tempfile.TemporaryDirectory(prefix="poise-needs-") as folder:
        told = Path(folder, "told")
        command = [sys.executable, "-m", "poise.compare.needs.child", str(told), *arguments]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            peak = watch(process, told, limit)
        finally:
            process.kill()
            said = process.communicate()[1].strip().splitlines()
        found = read(told)
        if "done" not in found:
            return Peak(None, None, said[-1] if said else f"the measuring process ended with code {process.returncode}")
        if "cuda_peak" in found:
            return Peak(int(found["cuda_peak"]), int(found["cuda_between"]))
        base = int(found["baseline"])
        return Peak(max(peak, int(found["between"])) - base, int(found["between"]) - base)


def watch(process: subprocess.Popen[str], told: Path, limit: float) -> int:
    """The most anonymous memory that the process held from its baseline until it was done."""
    peak, started = 0, time.monotonic()
    while process.poll() is None and time.monotonic() - started < limit:
        found = read(told)
        if "done" in found:
            break
        if "baseline" in found:
            peak = max(peak, anonymous(process.pid))
        time.sleep(INTERVAL)
    return peak


def anonymous(pid: int | str = "self") -> int:
    """Anonymous memory of a process in bytes; 0 for one that has gone, or where the system does not say."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def read(told: Path) -> dict[str, float]:
    """What the process has said so far, one JSON object a line."""
    found: dict[str, float] = {}
    if told.exists():
        for line in told.read_text().splitlines():
            try:
                found |= json.loads(line)
            except json.JSONDecodeError:
                break  # half written
    return found


__all__ = ["Peak", "anonymous", "available", "measure"]
