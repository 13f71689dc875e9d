"""Runs a section in processes of its own: what crashes or hangs is recorded, and a new process goes on behind it.

Nothing here imports torch: this process must live whatever a driver does.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import report

HERE = Path(__file__).resolve().parents[1]
ROOT = HERE.parent
UNUSABLE = 70  # a process's exit code: the device answers no more in it
OVERTIME = 60.0  # seconds that a task begun in time may still take: a first compilation, say
RESTARTS = 5  # of one section: a device that fails again and again is known well enough


@dataclass
class Limits:
    """Seconds: after which no further task begins, and after which one that says nothing is given up."""

    section: float
    stall: float


@dataclass
class Attempt:
    """What one process has said so far."""

    planned: list[str] = field(default_factory=list)
    begun: list[str] = field(default_factory=list)
    running: str | None = None
    finished: bool = False
    read: int = 0  # bytes of its file


def section(name: str, command: list[str], limits: Limits, whole: report.Whole, save: Callable[[], None]) -> None:
    """Run one section to its end, and put what it finds into `whole`."""
    entry = next(one for one in whole["sections"] if one["name"] == name)
    entry["ended"] = "running"
    started, done, planned = time.perf_counter(), [], []
    try:
        while True:
            left = limits.section - (time.perf_counter() - started)
            attempt, why = process(name, [*command, "--seconds", f"{left:.1f}"], done, limits, left, whole, save)
            planned = attempt.planned or planned
            done += attempt.begun
            if attempt.running is not None:
                message = why or "the process ended in the middle of it"
                if why is not None or not any(c["name"].startswith(attempt.running) for c in whole["checks"]):
                    report.add_check(whole, name, statement(attempt.running, False, message))
            if attempt.finished:
                entry["ended"] = "finished"
                break
            if not attempt.planned or entry["restarts"] == RESTARTS:
                entry["ended"] = report.scrub(why or "ended without a word")
                if not attempt.planned:
                    report.add_check(whole, name, statement(f"{name}: begins", False, entry["ended"]))
                break
            if not any(task not in done for task in planned):
                entry["ended"] = "finished"
                break
            if time.perf_counter() - started > limits.section:
                entry["ended"] = "out of time"
                break
            entry["restarts"] += 1
        late = entry["ended"] in ("finished", "out of time")
        for task in planned:
            if task not in done:
                message = "not run: time" if late else f"not run: the section {entry['ended']}"
                report.add_check(whole, name, statement(task, None, message))
                entry["ended"] = "out of time" if late else entry["ended"]
    except BaseException:
        entry["ended"] = "interrupted"
        raise
    finally:
        entry["seconds"] = round(time.perf_counter() - started, 1)
        save()


def statement(name: str, passed: bool | None, message: str) -> dict[str, Any]:
    return {"name": name, "passed": passed, "figure": None, "tolerance": None, "message": message}


def process(
    name: str, command: list[str], done: list[str], limits: Limits, left: float, whole: report.Whole, save: Callable[[], None]
) -> tuple[Attempt, str | None]:
    """One process: what it said, and what went wrong with it, if anything did."""
    attempt = Attempt()
    with tempfile.TemporaryDirectory(prefix="poise-gpu-check-") as folder:
        result, errors = Path(folder, "result"), Path(folder, "errors")
        paths = [str(HERE), str(ROOT / "src"), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        call = [sys.executable, "-m", "gpu.worker", name, str(result), *command, "--done", *done]
        with errors.open("w") as stream:
            # a session of its own, so that ranks and compilers end with it
            child = subprocess.Popen(call, stdout=stream, stderr=stream, start_new_session=True, env=environment, cwd=folder)
            heard = began = time.perf_counter()
            why: str | None = None
            try:
                while child.poll() is None and not attempt.finished:
                    time.sleep(0.05)
                    if listen(name, result, attempt, whole):
                        heard = time.perf_counter()
                        save()
                    silent = time.perf_counter() - heard
                    over = time.perf_counter() - began - left
                    if silent > limits.stall or over > min(limits.stall, OVERTIME):
                        why = f"did not finish in {silent:.0f} s"
                        break
            finally:
                end(child)
        listen(name, result, attempt, whole)
        if why is None and not attempt.finished and child.returncode != UNUSABLE:
            why = ended(child.returncode, errors)
    return attempt, why


def listen(name: str, result: Path, attempt: Attempt, whole: report.Whole) -> bool:
    """Take in the lines that have come since; whether there were any."""
    if not result.exists():
        return False
    with result.open("rb") as file:
        file.seek(attempt.read)
        new = file.read()
    new = new[: new.rfind(b"\n") + 1]  # a line may be half written
    attempt.read += len(new)
    for line in new.splitlines():
        known = json.loads(line)
        attempt.planned = known.get("planned", attempt.planned)
        attempt.finished = known.get("finished", attempt.finished)
        if "begin" in known:
            attempt.running = known["begin"]
            attempt.begun.append(known["begin"])
        if "end" in known:
            attempt.running = None
        for check in known.get("checks", ()):
            report.add_check(whole, name, check)
        whole["machine"].update(known.get("facts", {}))
        if name in report.MEASURED:
            whole[report.MEASURED[name]] += known.get("rows", ())
    return bool(new)


def ended(code: int, errors: Path) -> str:
    """What went wrong in a process that ended with this exit code."""
    if code < 0:
        return f"crashed by signal {-code} ({signal.Signals(-code).name})"
    said = errors.read_text(errors="replace").strip().splitlines()
    return f"failed: {said[-1] if said else f'exit code {code}'}"


def end(child: subprocess.Popen[Any]) -> None:
    """End a process and everything that it started."""
    with contextlib.suppress(ProcessLookupError):  # all gone already
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
