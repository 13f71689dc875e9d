"""Step time of poise's optimizers and their peers, as a ratio to torch's fused AdamW stepping in turns in the same process.

    python benchmarks/step_time.py [--rows adamw,lion] [--quick] [--json] [--out FILE]

README.md in this folder says what is measured and how.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import report
from rows import FUSED, PEERS, ROWS, Row

Known = dict[str, Any]

WORKER = Path(__file__).with_name("worker.py")


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by the way of `finally`: a worker has a session of its own
    chosen = choose(args.rows, args.quick)
    done = {key for row in chosen for key in row.beside}  # measured by the row that they stand beside
    found: dict[str, Known] = {}
    settings = {"quick": args.quick, "repeats": args.repeats, "processes": args.processes, "budget_s": args.budget}
    settings["limit_s"] = args.limit
    whole: dict[str, Any] = {"machine": report.machine(args.threads), "settings": settings, "rows": []}
    for row in chosen:
        if row.key not in done:
            found |= measure(row, args)
            whole["rows"] = [report.result(known, found[known.key]) for known in chosen if known.key in found]
            if args.out is not None:  # after every row, so that an interrupted run has not been for nothing
                args.out.write_text(json.dumps(whole, indent=2) + "\n")
    print(json.dumps(whole, indent=2) if args.json else report.text(whole))
    return 1 if any(known.get("failed") and ROWS[key].library in ("poise", "torch") for key, known in found.items()) else 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Step time of optimizers as a ratio to torch's fused AdamW.")
    names = sorted({row.name for row in ROWS.values()})
    parser.add_argument("--rows", metavar="NAMES", help=f"only these, with commas, from every library: {', '.join(names)}")
    parser.add_argument("--quick", action="store_true", help="7 rounds, no peers, no first-step time from empty caches")
    parser.add_argument("--repeats", type=int, metavar="N", help="rounds for each row; 40, or 7 with --quick")
    parser.add_argument(
        "--processes", type=int, metavar="N", help="of each row, the median of which counts; 3, or 1 with --quick"
    )
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="threads of torch; 2")
    parser.add_argument(
        "--budget", type=float, default=60.0, metavar="S", help="seconds for the rounds of a row, over all processes; 60"
    )
    parser.add_argument("--limit", type=float, default=300.0, metavar="S", help="seconds after which a row is given up; 300")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write that JSON object to FILE")
    args = parser.parse_args(argv)
    args.repeats = args.repeats if args.repeats is not None else 7 if args.quick else 40
    args.processes = args.processes if args.processes is not None else 1 if args.quick else 3
    for name in ("repeats", "processes", "threads", "budget", "limit"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name} {getattr(args, name)}: must be above 0")
    if args.out is not None and not args.out.absolute().parent.is_dir():
        parser.error(f"--out {args.out}: its folder does not exist")
    args.rows = None if args.rows is None else [name.strip() for name in args.rows.split(",")]
    if strange := set(args.rows or ()) - set(names):
        parser.error(f"--rows: unknown {', '.join(sorted(strange))}; known: {', '.join(names)}")
    return args


def choose(names: Sequence[str] | None, quick: bool) -> list[Row]:
    """The rows to measure. The null row always stands first; a row comes with what stands beside it."""
    rows = [row for row in ROWS.values() if not (quick and (row.library in PEERS or row.slow))]
    named = {row.key for row in rows if names is None or row.name in names or row is FUSED}
    return [row for row in rows if row.key in named or named.intersection(row.beside)]


def measure(row: Row, args: argparse.Namespace) -> dict[str, Known]:
    """What is known of a row, and of those beside it, by key.

    In an empty compile cache poise starts twice, cold and warm, and anything else once. With --quick the user's own cache
    serves, and first-step times mean nothing.
    """
    beside = [key for key in row.beside if not (args.quick and ROWS[key].slow)]
    options = ["--rounds", args.repeats, "--threads", args.threads, "--budget", args.budget / args.processes]
    with tempfile.TemporaryDirectory(prefix="poise-step-time-") as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
        if args.quick:
            found = middle([run([row.key, *beside], options, environment, args.limit) for _ in range(args.processes)])
            for known in found.values():
                known.pop("first_step_s", None)
            return found
        environment |= {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
        cold: Known = {}
        if row.library == "poise":
            cold = run([row.key], [*options, "--first-only"], environment, args.limit)[row.key]
        found = middle([run([row.key, *beside], options, environment, args.limit) for _ in range(args.processes)])
    for key, known in found.items():
        first = known.pop("first_step_s", None)
        if key == row.key and row.library == "poise":
            known["first_step_cold_s"], known["first_step_warm_s"] = cold.get("first_step_s"), first
        else:
            known["first_step_cold_s"] = first
    return found


def middle(runs: Sequence[dict[str, Known]]) -> dict[str, Known]:
    """Of several processes, for each row the one in the middle: where memory happens to lie moves all rounds of a process.

    A failure in any of them is the row's.
    """

    def place(known: Known) -> float:
        return known.get("ratio_to_products", known.get("ratio_to_torch_fused_adamw", 0.0))

    found = {}
    for key in runs[0]:
        ordered = sorted((one[key] for one in runs), key=place)
        failed = [known for known in ordered if "failed" in known]
        between = [known["ratio_to_torch_fused_adamw"] for known in ordered if "ratio_to_torch_fused_adamw" in known]
        found[key] = (failed or ordered)[(len(failed or ordered) - 1) // 2] | {"ratios_of_processes": between}
    return found


def run(keys: Sequence[str], options: Sequence[Any], environment: dict[str, str], limit: float) -> dict[str, Known]:
    """What worker.py says of these rows, or "failed" and why."""
    found: dict[str, Known] = {key: {} for key in keys}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="poise-step-time-") as folder:
        result, errors = Path(folder, "result"), Path(folder, "errors")
        command = [sys.executable, str(WORKER), str(result), *map(str, options), *keys]
        with errors.open("w") as stream:
            # a session of its own, so that a library's compile processes end with it
            process = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True, env=environment)
            try:
                failed = why(process.wait(limit), errors)
            except subprocess.TimeoutExpired:
                failed = f"did not finish in {limit:g} s"
            finally:
                end(process)
        if result.exists():
            for line in result.read_text().splitlines():
                known = json.loads(line)
                found[known.pop("key")].update(known)
    if failed is not None:
        for known in found.values():
            known.setdefault("failed", failed)
    print(f"{', '.join(keys)}: {time.perf_counter() - started:.0f} s {failed or ''}".rstrip(), file=sys.stderr)
    return found


def why(code: int, errors: Path) -> str | None:
    """What went wrong in a worker that ended with this exit code."""
    if code < 0:
        return f"crashed by signal {-code}"
    said = errors.read_text(errors="replace").strip().splitlines()
    return f"failed: {said[-1] if said else f'exit code {code}'}" if code else None


def end(process: subprocess.Popen[Any]) -> None:
    """End a worker and everything that it started."""
    with contextlib.suppress(ProcessLookupError):  # all gone already
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    sys.exit(main())
