"""Bytes of optimizer state per parameter, and the peak of memory of a whole training step, each in a fresh process.

    python benchmarks/memory.py [--state-only] [--json] [--out FILE]

README.md in this folder says what is measured and how.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lists
import torch
from worker import state_bytes

from poise import catalog, optim
from poise.compare import needs
from poise.compare.results import write_whole

TASKS = Path(__file__).with_name("memory_tasks")


@dataclass(frozen=True)
class Kept:
    """One optimizer on the list of a small GPT, and what its paper says that it keeps, in bytes a parameter."""

    name: str
    cls: str
    settings: dict[str, Any] = field(default_factory=dict)
    most: float | None = None  # what the project promises
    claim: str = ""


# Claims count the first and second moment of the paper's own setting; those of matrices leave out embeddings and vectors.
KEPT = (
    Kept("AdamW", "AdamW", claim="8"),
    Kept("AdamW, 8 bits", "AdamW", {"state": "int8"}, 2.1, "2 (8-bit Optimizers)"),
    Kept("AdamW, 4 bits", "AdamW", {"state": "int4"}, 1.1, "1 (4-bit States)"),
    Kept("AdamW, 4 bits, rank-1 scales", "AdamW", {"state": "int4-rank1"}, 1.1, "1"),
    Kept("AdamW, 4 bits, factored", "AdamW", {"state": "int4-factored"}, 0.6, "0.5"),
    Kept("Lion, 4 bits", "Lion", {"state": "int4"}, 0.55, "0.5"),
    Kept("Adam-mini", "AdamMini", {}, 4.1, "4"),
    Kept("MicroAdam", "MicroAdam", {}, 1.0, "0.9"),
    Kept("FRUGAL, density 0.25", "FRUGAL", {"density": 0.25}, None, "2 of matrices, 8 of the rest"),
    Kept("GaLore, rank 128", "GaLore", {"rank": 128}, None, "4 (2 r max + r min) a matrix, 8 of the rest"),
    Kept("SOAP", "SOAP", {}, 12.0, "12 (of matrices; published form 24 and more)"),
    Kept("Shampoo, grafted on Adam", "Shampoo", {"grafting": "adam"}, None, "24 of square blocks"),
    Kept("Shampoo, 4 bits", "Shampoo4Bit", {}, None, "8 of AdamW, and 2.25 of square blocks"),
)

# Each a command of `poise plan`: task, method, settings.
PEAKS: dict[str, tuple[str, str, list[str]]] = {
    "AdamW": ("code_lm_30m.py", "adamw", []),
    "AdamW, 4 bits": ("code_lm_30m.py", "adamw", ["state=int4"]),
    "Lion, 4 bits": ("code_lm_30m.py", "lion", ["state=int4"]),
    "BAdam around AdamW": ("code_lm_30m.py", "badam", []),
    "AdamW, 4 bits, CompAct": ("code_lm_30m_compact.py", "adamw", ["state=int4"]),
    "AdamW, CompAct": ("code_lm_30m_compact.py", "adamw", []),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Bytes of state and peaks of memory.")
    parser.add_argument("--state-only", action="store_true", help="leave out the peaks of training steps")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the tables")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write that JSON object to FILE")
    args = parser.parse_args(argv)
    found: dict[str, Any] = {"state": [], "peaks": []}

    def add(part: str, row: dict[str, Any]) -> None:
        """Each row is kept and told as soon as it is measured: the whole takes minutes."""
        found[part].append(row)
        if args.out is not None:
            write_whole(args.out, json.dumps(found, indent=1) + "\n")
        if not args.json:
            print(state_line(row) if part == "state" else peak_line(row), flush=True)

    if not args.json:
        print(STATE_HEAD, flush=True)
    for row in KEPT:
        add("state", kept(row))
    if not args.state_only:
        if not args.json:
            print("\n" + PEAK_HEAD, flush=True)
        for name in PEAKS:
            add("peaks", peak(name))
    if args.json:
        print(json.dumps(found, indent=1))
    missed = [row["name"] for row in found["state"] if row["most"] is not None and row["bytes_per_param"] > row["most"]]
    return 1 if missed else 0


def kept(row: Kept) -> dict[str, Any]:
    """After two steps, in which state that rests has been woken."""
    params = lists.make("gpt")
    optimizer = getattr(optim, row.cls)(params, backend="eager", **row.settings)
    for _ in range(2):
        optimizer.step()
    held = state_bytes(optimizer, params) / sum(p.numel() for p in params)
    return {"name": row.name, "bytes_per_param": held, "most": row.most, "claim": row.claim}


def peak(name: str) -> dict[str, Any]:
    """Counted by part, and measured in a process of its own."""
    file, method, settings = PEAKS[name]
    from poise.compare import tasks
    from poise.compare.entries import entry_of, setting

    task = tasks.load(str(TASKS / file))
    whole = needs.count(task, entry_of(catalog.get(method), dict(map(setting, settings)))).whole
    measured = needs.measure([str(TASKS / file), method, json.dumps(settings), "0", "cpu"])
    parts = {part: getattr(whole, part) for part in ("parameters", "weights", "gradients", "state", "activations")}
    return {"name": name, **parts, "peak": measured.peak, "between": measured.between, "failed": measured.failed}


COLUMNS = ("weights", "gradients", "state", "activations", "peak", "between")
STATE_HEAD = f"{'state, bytes a parameter':32} {'measured':>9} {'at most':>8}  claim"
PEAK_HEAD = f"{'a training step, MB':32} " + " ".join(f"{column:>11}" for column in COLUMNS)


def state_line(row: dict[str, Any]) -> str:
    most = "" if row["most"] is None else f"{row['most']:.2f}"
    return f"{row['name']:32} {row['bytes_per_param']:9.3f} {most:>8}  {row['claim']}"


def peak_line(row: dict[str, Any]) -> str:
    cells = ["-" if row[column] is None else f"{row[column] / 1e6:.1f}" for column in COLUMNS]
    return f"{row['name']:32} " + " ".join(f"{cell:>11}" for cell in cells) + (f"  {row['failed']}" if row["failed"] else "")


if __name__ == "__main__":
    torch.set_num_threads(2)
    sys.exit(main())
