"""What stands out in a checkpoint: what is broken, what is likely a mistake, what a later step will stumble over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .checkpoint import Checkpoint
from .statistics import tiles
from .structure import Structure
from .structure.heads import number
from .structure.ties import insists

if TYPE_CHECKING:
    from .inspecting import Tensor

LEVELS = ("error", "warning", "note")
OUTLIER = 40.0  # an entry of so many RMS costs a quantizer that spans it five of its eight bits
ILL = 1e6  # condition number from which on float32 cannot invert
TYPED = ("conv", "matrix", "attention", "mlp", "expert", "router", "head", "embedding")


@dataclass(frozen=True)
class Finding:
    """One thing.

    Attributes:
        level: "error": the model cannot be right; "warning": it is likely not meant; "note": worth knowing.
        says: in one sentence.
        tensor: whose it is; None of the whole.
    """

    level: str
    says: str
    tensor: str | None = None


def findings(checkpoint: Checkpoint, structure: Structure, tensors: Mapping[str, Tensor]) -> list[Finding]:
    """Everything that stands out in the tensors that were measured, the worst first, in the order of the checkpoint."""
    found = [Finding("error", str(says)) for says in checkpoint.warnings] or of_head(structure)
    found += [*of_ties(checkpoint, structure, tensors), *of_vocabulary(checkpoint.config, structure), *of_dtypes(tensors)]
    for tensor in tensors.values():
        found += of_tensor(tensor)
    return sorted(found, key=lambda finding: LEVELS.index(finding.level))


def of_tensor(tensor: Tensor) -> list[Finding]:
    seen, what, name = tensor.statistics, tensor.described, tensor.name
    found = []
    for count, kind in ((seen.nan, "NaN"), (seen.inf, "infinite")):
        if count:
            at = "" if seen.first_bad is None else f", the first that is not finite at {list(seen.first_bad)}"
            found.append(Finding("error", f"{count:,} of {seen.count:,} entries are {kind}{at}", name))
    mapped = what.role.partition(".")[0] in TYPED
    if seen.count and seen.zeros == seen.count and mapped:
        found.append(Finding("warning", "every entry is zero", name))
    elif mapped and len(tensor.info.shape) > 1:
        # Unused tokens and padding are zero by design.
        level = "note" if what.role in ("embedding", "head") else "warning"
        for dead, side in ((seen.zero_rows, "rows"), (seen.zero_columns, "columns")):
            if dead:
                size = tensor.info.shape[0 if side == "rows" else -1]
                found.append(Finding(level, f"{dead:,} of {size:,} {side} are zero throughout", name))
    if mapped and seen.count > 1 and seen.std == 0 and seen.rms > 0:
        found.append(Finding("warning", f"every entry is {seen.mean:g}", name))
    if mapped and seen.largest > OUTLIER:
        found.append(Finding("note", f"the largest entry is {seen.largest:.0f} times the root mean square", name))
    if tensor.spectrum is not None and tensor.spectrum.condition is not None and tensor.spectrum.condition >= ILL:
        condition, where = tensor.spectrum.condition, tensor.spectrum.place
        of = "" if where is None else f" of expert {where}"
        says = f"the condition number{of} is {condition:.1e}" if condition < float("inf") else f"the matrix{of} is singular"
        found.append(Finding("note", says, name))
    return found


def of_head(structure: Structure) -> list[Finding]:
    """A head that would be random."""
    tied = structure.tied
    return [] if tied.problem is None else [Finding("error", tied.problem, tied.embedding)]


def of_ties(checkpoint: Checkpoint, structure: Structure, tensors: Mapping[str, Tensor]) -> list[Finding]:
    """A head that would be overwritten, one that is stored twice."""
    head, embedding = structure.tied.head, structure.tied.embedding
    if head is None or embedding is None or not {head, embedding} <= set(tensors):
        return []
    if checkpoint.info(head).shape != checkpoint.info(embedding).shape:
        return []
    equal = same(checkpoint, head, embedding)
    if equal and not insists(checkpoint.config):
        size = checkpoint.info(head).nbytes
        return [Finding("note", f"equal to {embedding!r} in every bit; tied, the model would be {size:,} bytes smaller", head)]
    if not equal and insists(checkpoint.config):
        says = (
            f"config.json ties it to {embedding!r}, from which it differs: one of the two will be dropped; "
            "say tie_word_embeddings: false"
        )
        return [Finding("error", says, head)]
    return []


def of_vocabulary(config: Mapping[str, Any], structure: Structure) -> list[Finding]:
    said = number(config, ("vocab_size",))
    if said is None or structure.vocabulary is None or said == structure.vocabulary or structure.tied.embedding is None:
        return []
    return [
        Finding(
            "error",
            f"{structure.vocabulary:,} tokens have a row, config.json says vocab_size {said:,}",
            structure.tied.embedding,
        )
    ]


def of_dtypes(tensors: Mapping[str, Tensor]) -> list[Finding]:
    """Weights in a dtype that most are not in, as one finding for each such dtype."""
    kinds = {t.name: t.info.dtype for t in tensors.values() if t.info.dtype.is_floating_point and t.described.role != "buffer"}
    counts = Counter(kinds.values())
    if len(counts) < 2:
        return []
    main = counts.most_common(1)[0][0]
    found = []
    for dtype, count in counts.items():
        if dtype != main:
            first = next(name for name, kind in kinds.items() if kind == dtype)
            says = f"{count:,} of {len(kinds):,} tensors are {plain(dtype)} where most are {plain(main)}, as {first!r}"
            found.append(Finding("note", says))
    return found


def same(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two tensors hold the same numbers, compared a few rows at a time."""
    pairs = zip(tiles(checkpoint, one), tiles(checkpoint, other), strict=True)
    return checkpoint.info(one).dtype == checkpoint.info(other).dtype and all(torch.equal(a, b) for a, b in pairs)


def plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
