"""Whether a matrix is stored (out, in), as torch's Linear does, or (in, out), as GPT-2's Conv1D and many stacked experts do."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

READS_WIDTH = ("q", "k", "v", "qkv", "kv", "gate", "up", "gate_up")  # their inputs are the model's own channels


@dataclass(frozen=True)
class Matrix:
    """What is known of a matrix, or of a stack of them, before its orientation is.

    Attributes:
        role, label: see `roles`; the label is the name of its module.
        stack: of its layer, "" outside of layers.
        shape: of the weight; the last two dimensions count.
        bias: length of the bias beside it, None without one.
    """

    role: str
    label: str
    stack: str
    shape: torch.Size
    bias: int | None


def inputs_first(matrices: Mapping[str, Matrix], width: int | None) -> dict[str, bool]:
    """Whether each matrix has its inputs in the last dimension but one.

    A bias is as long as there are outputs, and projections in attention and MLP read, or make, the model's own `width`: either
    tells of a matrix that is not square. A square one is as most of those with its name in its stack are, else as most of the
    stack is; and a model in which nothing tells is torch's.
    """
    told = {name: evidence(matrix, width) for name, matrix in matrices.items()}
    votes: dict[Sequence[str], Counter[bool]] = defaultdict(Counter)
    for name, matrix in matrices.items():
        if (says := told[name]) is not None:
            votes[matrix.stack, matrix.label][says] += 1
            votes[matrix.stack, family(matrix)][says] += 1
    found = {}
    for name, matrix in matrices.items():
        says = told[name]
        if says is None:
            cast = votes.get((matrix.stack, matrix.label)) or votes.get((matrix.stack, family(matrix)))
            says = cast.most_common(1)[0][0] if cast else False
        found[name] = says
    return found


def evidence(matrix: Matrix, width: int | None) -> bool | None:
    """What a matrix says by itself; None if nothing."""
    rows, columns = matrix.shape[-2:]
    if rows == columns:
        return None
    if matrix.bias in (rows, columns):
        return matrix.bias == columns
    if width not in (rows, columns):
        return None
    part = matrix.role.rpartition(".")[2]
    if part in READS_WIDTH:
        return rows == width
    return columns == width if part in ("o", "down") else None


def family(matrix: Matrix) -> str:
    """Layers that one author wrote alike: stacks of experts, or plain matrices. No label looks like these."""
    return "<stacked>" if len(matrix.shape) > 2 else "<plain>"
