"""What was measured, as JSON entries and as a table with the targets beside the figures."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rows import COLD, COLD_PER_FURTHER_KERNEL, OF_PRODUCTS, WARM, Row

# What the least traffic of a row is held against: fp32 AdamW reads and writes weights and two moments, and reads gradients.
ADAMW_BYTES = 28.0

MEASURED = (
    "ratio_to_torch_fused_adamw", "ratio_q1", "ratio_q3", "ratios_of_processes", "ns_per_param", "fused_ns_per_param",
    "state_bytes_per_param", "first_step_cold_s", "first_step_warm_s", "kernels", "rounds", "copy_gb_s", "trajectory_error",
    "orthogonality_error", "ratio_to_torch_muon", "ratio_to_torch_muon_q1", "ratio_to_torch_muon_q3",
    "ratio_to_products", "ratio_to_products_q1", "ratio_to_products_q3", "version",
)  # fmt: skip


def machine(threads: int) -> dict[str, Any]:
    """Where the figures come from."""
    facts = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.*)$", facts.read_text(), re.MULTILINE) if facts.exists() else None
    return {
        "cpu": named[1] if named else platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": sys.platform,
    }


def result(row: Row, known: dict[str, Any]) -> dict[str, Any]:
    """One entry of `rows`: what was not measured is null."""
    entry: dict[str, Any] = {"name": row.name, "library": row.library, "list": row.params}
    entry |= {name: known.get(name) for name in MEASURED}
    least = known.get("least_bytes_per_param")
    ns = entry["ns_per_param"]
    entry["gb_per_s"] = least / ns if least is not None and ns is not None else None
    entry["traffic_ratio"] = least / ADAMW_BYTES if least is not None else None
    entry["target_ratio"] = row.target
    if row.of_traffic is not None and least is not None:
        entry["target_ratio"] = row.of_traffic * least / ADAMW_BYTES
    entry["iterations"] = row.iterations or None
    ours = row.library == "poise"
    kernels = entry["kernels"] or 1
    entry["target_first_step_cold_s"] = COLD + COLD_PER_FURTHER_KERNEL * (kernels - 1) if ours else None
    entry["target_first_step_warm_s"] = WARM if ours else None
    entry["failed"] = known.get("failed")
    entry["note"] = "; ".join(note for note in (_cut(known.get("failed") or ""), row.note, *_notes(entry)) if note)
    return entry


def _notes(entry: dict[str, Any]) -> list[str]:
    notes: list[str] = []
    if entry["ratio_to_torch_muon"] is not None:
        q1, median, q3 = (entry[f"ratio_to_torch_muon{end}"] for end in ("_q1", "", "_q3"))
        notes.append(f"{median:.3g} [{q1:.3g}, {q3:.3g}] of torch's Muon")
    if entry["ratio_to_products"] is not None:
        q1, median, q3 = (entry[f"ratio_to_products{end}"] for end in ("_q1", "", "_q3"))
        notes.append(
            f"{median:.2f} [{q1:.2f}, {q3:.2f}] of the bare products of {entry['iterations']} Newton-Schulz iterations"
        )
        notes.append(f"<= {OF_PRODUCTS}{_met(median, OF_PRODUCTS)}")
    if (error := entry["orthogonality_error"]) is not None:
        notes.append(
            f"orthogonality error {error['relative']:.3f}, singular values {error['sigma_min']:.2f} to {error['sigma_max']:.2f}"
        )
    if entry["trajectory_error"] is not None:
        notes.append(f"displacement after 100 steps off by {entry['trajectory_error']:.2%}")
    if entry["rounds"] is not None and entry["rounds"] < 5:
        notes.append(f"only {entry['rounds']} rounds" if entry["rounds"] > 1 else "only 1 round")
    return notes


HEAD = (
    "row", "library", "list", "x fused AdamW", "target", "by traffic", "ns/param", "GB/s", "state B/param",
    "first step cold, s", "warm, s", "",
)  # fmt: skip


def text(whole: dict[str, Any]) -> str:
    """Machine, table and legend."""
    m = whole["machine"]
    copies = [row["copy_gb_s"] for row in whole["rows"] if row["copy_gb_s"] is not None]
    versions = {row["library"]: row["version"] for row in whole["rows"] if row["version"] is not None}
    load = "" if m["load_before"] is None else f", load before {m['load_before']:.1f}"
    lines = [
        f"{m['cpu']} ({m['capability']}), {m['cores']} cores, {m['threads']} threads{load}",
        f"Python {m['python']}, " + ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    if copies:
        lines.append(f"copy between large tensors, measured in every process: {_range(copies)} GB/s")
    lines += ["", *_aligned([HEAD, *(_cells(row) for row in whole["rows"])]), "", LEGEND]
    return "\n".join(lines)


LEGEND = """\
x fused AdamW: median over the rounds [first, third quartile]; in each round both step, in turns. The null row shows the noise.
by traffic: what the ratio would be if time went with the bytes that must move: weights and state read and written, gradients
read, twice where a sum over them decides the step. GB/s: those bytes by the time. First step: building the optimizer and one
step, nothing compiled / kernels on disk."""


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    ratio = row["ratio_to_torch_fused_adamw"]
    spread = "-" if ratio is None else f"{_short(ratio)} [{_short(row['ratio_q1'])}, {_short(row['ratio_q3'])}]"
    large = row["list"] == "gpt"  # what bytes say holds only where little is computed and nothing stays in cache
    return (
        row["name"],
        row["library"],
        row["list"],
        spread,
        _target(ratio, row["target_ratio"]),
        _number(row["traffic_ratio"] if large else None, ".2f"),
        _number(row["ns_per_param"], ".3g"),
        _number(row["gb_per_s"] if large else None, ".1f"),
        _number(row["state_bytes_per_param"], ".2f"),
        _against(row["first_step_cold_s"], row["target_first_step_cold_s"]),
        _against(row["first_step_warm_s"], row["target_first_step_warm_s"]),
        row["note"],
    )


def _target(value: float | None, target: float | None) -> str:
    if target is None:
        return ""
    return f"<= {target:.3g}{_met(value, target)}"


def _met(value: float | None, target: float) -> str:
    return "" if value is None else " met" if value <= target else " MISSED"


def _against(value: float | None, target: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f} {_target(round(value, 1), target)}".rstrip()


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _cut(said: str, length: int = 100) -> str:
    return said if len(said) <= length else f"{said[: length - 3]}..."


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low} to {high}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(cells[i]) for cells in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in rows]
