"""The one JSON file of a check, written anew whenever something is known, and the same for a reader in a terminal."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import re
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SCHEMA = 1
MEASURED = {"steps": "steps", "memory": "memory"}  # sections whose rows have a table of their own in the file

Whole = dict[str, Any]


def begin(version: str, settings: dict[str, Any], planned: Sequence[str]) -> Whole:
    """A file in which nothing is known yet."""
    return {
        "schema": SCHEMA,
        "poise": version,
        "finished": False,
        "settings": settings,
        "machine": {},
        "sections": [{"name": name, "seconds": None, "ended": "not begun", "restarts": 0} for name in planned],
        "checks": [],
        **{name: [] for name in MEASURED.values()},
        "verdict": {"passed": 0, "failed": 0, "not_run": 0},
    }


def add_check(whole: Whole, section: str, check: dict[str, Any]) -> None:
    """One more statement, and the verdict with it."""
    whole["checks"].append({"section": section, **check, "message": scrub(check["message"])})
    told = {True: "passed", False: "failed", None: "not_run"}[check["passed"]]
    whole["verdict"][told] += 1


def write(whole: Whole, path: Path) -> None:
    """Replace the file in one go: whoever reads it, and whatever happens here, it is whole. What is no number becomes null."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(numbers(whole), indent=1, allow_nan=False) + "\n")
    os.replace(part, path)


def numbers(value: Any) -> Any:
    """JSON knows neither NaN nor infinity; these become null, as in a browser."""
    if isinstance(value, dict):
        return {key: numbers(one) for key, one in value.items()}
    if isinstance(value, list):
        return [numbers(one) for one in value]
    if isinstance(value, float) and not (float("-inf") < value < float("inf")):
        return None
    return value


def scrub(said: str, length: int = 600) -> str:
    """What a library said, without folders, host and user names, and not too long."""
    said = re.sub(r"(?:[A-Za-z]:)?(?<![\w.])(?:~|\.{0,2})[/\\](?:[^\s/\\'\":,;()<>]+[/\\])+", "", said)
    said = re.sub(r"(?<![\w./])/(?=[\w.])", "", said)
    for name, instead in _names():
        said = re.sub(rf"\b{re.escape(name)}\b", instead, said)
    said = said.strip()
    return said if len(said) <= length else f"{said[: length - 3]}..."


def _names() -> list[tuple[str, str]]:
    """Host and user, where they are names and no common words."""
    found = [(socket.gethostname(), "HOST"), (socket.getfqdn(), "HOST")]
    with contextlib.suppress(Exception):
        found.append((getpass.getuser(), "USER"))
    return [(name, instead) for name, instead in found if len(name) > 2 and name not in ("root", "localhost", "user", "ubuntu")]


def text(whole: Whole) -> str:
    """The file as a reader wants it: the machine, what failed, the tables, one line that says how it went."""
    m, v = whole["machine"], whole["verdict"]
    gpus = [f"{gpu['name']}, {gpu['memory_gb']} GB" if "memory_gb" in gpu else gpu["name"] for gpu in m.get("gpus", [])]
    builds = {"HIP": m.get("torch_hip"), "CUDA": m.get("torch_cuda")}
    backend = next((f"{name} {version}" for name, version in builds.items() if version), "no GPU build")
    lines = [
        "; ".join(gpus) or str(m.get("device", "machine unknown")),
        f"torch {m.get('torch')} ({backend}), triton {m.get('triton')}, driver {m.get('driver')}, Python {m.get('python')}",
    ]
    if "copy_gb_s" in m:
        products = [f"{m[k]:.3g} TFLOP/s in {k.split('_')[1]}" for k in m if k.startswith("matmul_")]
        lines.append(f"copy {m['copy_gb_s']:.0f} GB/s, products {', '.join(products)}")
    lines += ["", *_checks(whole)]
    lines += _table("time of a step, by torch's in the same process", whole["steps"], STEPS)
    lines += _table("bytes by parameter", whole["memory"], MEMORY)
    for section in whole["sections"]:
        if section["ended"] != "finished":
            lines.append(f"{section['name']}: {section['ended']}")
    lines += ["", f"{v['passed']} checks passed, {v['failed']} failed, {v['not_run']} not run"]
    return "\n".join(lines)


def _checks(whole: Whole) -> list[str]:
    lines = []
    for section in whole["sections"]:
        mine = [c for c in whole["checks"] if c["section"] == section["name"]]
        bad = [c for c in mine if c["passed"] is False]
        missing = sum(c["passed"] is None for c in mine)
        spent = "" if section["seconds"] is None else f" in {section['seconds']:.0f} s"
        good = len(mine) - len(bad) - missing
        lines.append(f"{section['name']}{spent}: {good} passed, {len(bad)} failed, {missing} not run")
        for c in bad:
            figure = "" if c["figure"] is None else f" {c['figure']:.3g} > {c['tolerance']:.3g}"
            lines.append(f"  FAILED {c['name']}:{figure} {c['message'].splitlines()[0] if c['message'] else ''}".rstrip())
    return lines


Cells = dict[str, Callable[[dict[str, Any]], str]]


def _n(row: dict[str, Any], name: str, form: str) -> str:
    return "-" if row.get(name) is None else format(row[name], form)


STEPS: Cells = {
    "": lambda r: r["name"],
    "parameters": lambda r: f"{r['parameters'] / 1e6:.3g}M in {r['tensors']}",
    "peer": lambda r: r["peer"],
    "ratio": lambda r: f"{r['ratio']:.2f} [{r['ratio_q1']:.2f}, {r['ratio_q3']:.2f}]",
    "ms": lambda r: _n(r, "ms", ".3g"),
    "device busy, ms": lambda r: _n(r, "busy_ms", ".3g"),
    "launches": lambda r: _n(r, "launches", "d"),
    "first step, s": lambda r: _n(r, "first_step_s", ".1f"),
}
MEMORY: Cells = {
    "": lambda r: r["name"],
    "weights": lambda r: r["weights"],
    "state": lambda r: _n(r, "state_bytes_per_param", ".2f"),
    "kept beside it": lambda r: _n(r, "kept_beside_state_per_param", ".2f"),
    "peak above weights and gradients": lambda r: _n(r, "peak_above_weights_and_gradients_per_param", ".2f"),
}


def _table(title: str, rows: Sequence[dict[str, Any]], cells: Cells) -> list[str]:
    if not rows:
        return []
    table = [tuple(cells), *(tuple(cell(row) for cell in cells.values()) for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(cells))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in table]
    return ["", title, *(f"  {line}" for line in lines)]
