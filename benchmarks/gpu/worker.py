"""One section in a process of its own: `python -m gpu.worker SECTION RESULT ...`, started by run.py.

It writes one JSON object a line, at once, so that what is known outlives a crash: {"planned": [...]}, then for each task
{"begin": name}, what it found, {"end": name}.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import runpy
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from .run import UNUSABLE
from .settings import Found, Settings, failed


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("section")
    parser.add_argument("result", type=Path)
    parser.add_argument("--device", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--plugin")
    parser.add_argument("--done", nargs="*", default=[])
    args = parser.parse_args()

    def tell(**known: Any) -> None:
        with args.result.open("a") as file:
            file.write(json.dumps(known) + "\n")

    warnings.filterwarnings("ignore")
    settings = Settings(args.device, args.quick, time.time() + args.seconds, args.plugin)
    if args.plugin is not None:
        runpy.run_path(args.plugin)
    tasks = importlib.import_module(f"gpu.{args.section}").tasks(settings)
    tell(planned=list(tasks))
    for name, task in tasks.items():
        if name in args.done:
            continue
        if settings.seconds < 0:
            break
        tell(begin=name)
        lost = False
        try:
            found = task()
        except Exception as error:
            found, lost = Found([failed(name, error)]), unusable(error)
        tell(**dataclasses.asdict(found))
        tell(end=name)
        if lost:
            os._exit(UNUSABLE)
    tell(finished=True)


def unusable(error: Exception) -> bool:
    """Whether the device is lost to this process: after a fault in a kernel every later call fails too."""
    return type(error).__name__ in ("AcceleratorError", "Lost") or "CUDA error" in str(error) or "HIP error" in str(error)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # without the teardown of libraries, in which a broken driver may hang
