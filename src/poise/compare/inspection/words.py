"""What the page says in words and in tables."""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

from poise.checkpoint.inspecting import Inspection, Tensor


class Row(NamedTuple):
    """One tensor in the table, as it is read."""

    name: str
    role: str
    more: str  # orientation, parts, ties
    dtype: str
    shape: str
    norm: str
    rms: str
    largest: str
    kurtosis: str
    zeros: str
    spectral: str
    stable: str
    effective: str
    condition: str
    bad: bool


def sentence(found: Inspection) -> str:
    """What the page says first."""
    levels = Counter(finding.level for finding in found.findings)
    said = [
        f"{levels[level]} {level}{'s' if levels[level] > 1 else ''}" for level in ("error", "warning", "note") if levels[level]
    ]
    stands = ", ".join(said) if said else "nothing stands out"
    return f"{count(found.parameters)} parameters: {stands}"


def facts(found: Inspection) -> list[tuple[str, str]]:
    """Heading and text of what is known of the whole."""
    structure, tied = found.structure, found.structure.tied
    said = [("size", f"{found.nbytes:,} bytes in {len(structure.tensors):,} tensors")]
    if structure.stacks:
        said.append(("layers", ", ".join(f"{number} in {stack}" for stack, number in structure.stacks.items())))
    if structure.width is not None:
        heads = structure.heads
        attention = "" if heads is None else f", {heads.heads} heads"
        shared = "" if heads is None or heads.heads == heads.kv_heads else f" with {heads.kv_heads} for keys and values"
        said.append(("width", f"{structure.width:,}{attention}{shared}"))
    if structure.vocabulary is not None:
        said.append(("vocabulary", f"{structure.vocabulary:,} tokens"))
    if tied.shared:
        said.append(("output head", f"tied: it is {tied.embedding}"))
    elif tied.head is not None:
        said.append(("output head", tied.head))
    if structure.ties:
        said.append(("tied", ", ".join(f"{other} is {stored}" for other, stored in structure.ties.items())))
    return said


def totals(found: Inspection) -> dict[str, list[tuple[str, str, str, float]]]:
    """Heading -> rows of name, parameters, bytes, and share of the bytes."""
    whole = sum(tensor.info.nbytes for tensor in found.tensors) or 1
    return {
        heading: [(key, f"{parameters:,}", f"{nbytes:,}", nbytes / whole) for key, (_, parameters, nbytes) in sums.items()]
        for heading, sums in (("by role", found.roles), ("by dtype", found.dtypes))
    }


def rows(found: Inspection) -> list[Row]:
    tied = {stored: other for other, stored in found.structure.ties.items()}
    return [row(tensor, tied.get(tensor.name)) for tensor in found.tensors]


def row(tensor: Tensor, other: str | None) -> Row:
    seen, what, spectrum = tensor.statistics, tensor.described, tensor.spectrum
    more = ["stored (in, out)"] if what.inputs_first else []
    if what.parts:
        more.append(" | ".join(f"{part.role.rpartition('.')[2]} {part.size}" for part in what.parts))
    if what.experts is not None:
        more.append(f"{what.experts} experts")
    if other is not None:
        more.append(f"also {other}")
    if seen.nan or seen.inf:
        more.append(f"{seen.nan:,} NaN, {seen.inf:,} infinite")
    values = (
        (None,) * 4
        if spectrum is None
        else (spectrum.spectral, spectrum.stable_rank, spectrum.effective_rank, spectrum.condition)
    )
    spectral, stable, effective, condition = map(short, values)
    return Row(
        tensor.name,
        what.role,
        "; ".join(more),
        str(tensor.info.dtype).removeprefix("torch."),
        " × ".join(map(str, tensor.info.shape)) or "0-d",
        short(seen.norm),
        short(seen.rms),
        short(seen.largest),
        short(seen.kurtosis),
        f"{seen.zeros / seen.count:.1%}" if seen.zeros else "",
        spectral,
        stable,
        effective,
        condition,
        bool(seen.nan or seen.inf),
    )


def short(value: float | None) -> str:
    if value is None or math.isnan(value):
        return ""
    return "∞" if math.isinf(value) else f"{value:.3g}"


def count(parameters: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if parameters >= unit:
            return f"{parameters / unit:.3g} {name}"
    return str(parameters)
