"""Parameters in blocks: which entries share one number, by what a parameter is.

Blocks follow the outputs: a block is some neighbouring rows of the weight as (outputs, inputs), whole. They are told as runs
`((count, rows), ...)` from the first row on: `((8, 64), (512, 1))` is eight blocks of 64 rows, then 512 of one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, get_args

from ..transform import Param

Named = Literal["head", "row", "tensor", "element"]
Spec = Named | int
Runs = tuple[tuple[int, int], ...]

# Projections to queries and keys, and to values, by the names of the field; whole words, and never a fused projection.
_QUERY_OR_KEY = re.compile(r"(^|\.)(q|k|([a-z0-9]+_)*([qk]_proj|w[qk]|to_[qk]|query|key))(_weight|_proj|_b_proj)?(\.|$)")
_VALUE = re.compile(r"(^|\.)(?!query_key)(v|([a-z0-9]+_)*(v_proj|wv|to_v|value))(_weight|_proj)?(\.|$)")


@dataclass(frozen=True)
class Partition:
    """The blocks of a parameter: those asked for by name, else by its role.

    | what                                                           | blocks                                             |
    |----------------------------------------------------------------|----------------------------------------------------|
    | bias, also of a norm                                           | one for each element                               |
    | norm, any other vector, scalar                                 | one                                                |
    | projection to queries or keys (also as a part of a fused one)  | one for each head, where the size of one is known  |
    | projection to values                                           | one for each row, or one under value="tensor"      |
    | any other matrix, embedding, head, convolution, experts        | one for each row: neuron, token, class, channel    |

    Heads of keys that several queries share are fewer and of the same size. Each of stacked experts has blocks of its own.

    Args:
        asked: (pattern, spec) in order of precedence; a pattern is a glob or "re:..." as in `by_name`. A spec is a name of the
            table's second column (`"element"`, `"tensor"`, `"head"`, `"row"`) or into how many equal blocks rows are cut.
        head_dim: rows of one head, where the model does not say it; without either, queries and keys go by rows.
        value: of projections to values.

    Raises:
        ValueError: for an unknown spec; when a parameter is seen, for heads of unknown size and rows that do not divide.
    """

    asked: tuple[tuple[str, Spec], ...] = ()
    head_dim: int | None = None
    value: Literal["row", "tensor"] = "row"

    def __post_init__(self) -> None:
        for pattern, spec in self.asked:
            known = spec in get_args(Named) if isinstance(spec, str) else type(spec) is int and spec >= 1
            if not known:
                names = ", ".join(map(repr, get_args(Named)))
                raise ValueError(f"blocks[{pattern!r}]={spec!r}: must be one of {names}, or a number of blocks")
        if self.head_dim is not None and self.head_dim < 1:
            raise ValueError(f"head_dim={self.head_dim}: must be at least 1")
        if self.value not in ("row", "tensor"):
            raise ValueError(f"value={self.value!r}: must be 'row' or 'tensor'")

    def __call__(self, p: Param) -> Runs | None:
        """The runs of one parameter; None: a block for each element."""
        for pattern, spec in self.asked:
            if matches(pattern, p.name):
                return self.runs(p, spec)
        if p.role == "bias" or "bias" in p.name.rpartition(".")[2]:  # that of a norm has the role of its norm
            return None
        if len(p.shape) < 2 or p.role in ("norm", "vector", "scalar"):
            return self.runs(p, "tensor")
        size, name = self.head_size(p), p.name.lower()
        if len(p.splits) == 3:
            query, key, value = p.splits
            heads = [(part // size, size) if size and part % size == 0 else (part, 1) for part in (query, key)]
            return *heads, (1, value) if self.value == "tensor" else (value, 1)
        if p.role == "matrix" and self.value == "tensor" and _VALUE.search(name):
            return self.runs(p, "tensor")
        by_head = p.role == "matrix" and size is not None and outputs(p) % size == 0 and _QUERY_OR_KEY.search(name)
        return self.runs(p, "head" if by_head else "row")

    def runs(self, p: Param, spec: Spec) -> Runs | None:
        """The runs of a parameter under one spec."""
        rows = outputs(p)
        if spec == "element":
            return None
        if isinstance(spec, int):
            if rows % spec:
                raise ValueError(f"blocks: {p.name!r} has {rows} rows, which do not make {spec} equal blocks")
            return ((spec, rows // spec),)
        if spec == "tensor" or len(p.shape) < 2:  # of a vector, a row is an element, and a pattern for matrices did not mean it
            return ((1, rows),)
        if spec == "row":
            return ((rows, 1),)
        size = self.head_size(p)
        if size is None or rows % size:
            told = "no module says how large one is" if size is None else f"{rows} rows are no multiple of {size}"
            raise ValueError(f"blocks: {p.name!r} cannot be cut by heads: {told}; pass head_dim=, or a number of blocks")
        return ((rows // size, size),)

    def head_size(self, p: Param) -> int | None:
        """Rows of one attention head."""
        if self.head_dim is not None:
            return self.head_dim
        rows = p.splits[0] if p.splits else outputs(p)
        return rows // p.heads if p.heads and rows % p.heads == 0 else None


def matches(pattern: str, name: str) -> bool:
    """As `by_name` reads patterns: a glob for the whole name, or after "re:" an expression that may match anywhere."""
    if pattern.startswith("re:"):
        return re.search(pattern[3:], name) is not None
    return fnmatchcase(name, pattern)


def outputs(p: Param) -> int:
    """Rows of a parameter as (outputs, inputs); of a vector, its elements."""
    return p.matrix[0] if len(p.shape) > 1 else p.shape.numel()


def in_elements(runs: Runs | None, p: Param) -> Runs | None:
    """Runs of rows as runs of elements, as `Transform.blocks` wants them; stacked experts one after another."""
    if runs is None:
        return None
    experts = math.prod(p.shape[:-2]) if p.role == "experts" else 1
    columns = p.shape.numel() // max(experts * outputs(p), 1)
    found = tuple((count, size * columns) for count, size in runs)
    return ((experts * found[0][0], found[0][1]),) if len(found) == 1 else found * experts


def totals(runs: Sequence[tuple[int, int]]) -> int:
    """How many blocks there are."""
    return sum(count for count, _ in runs)


__all__ = ["Partition", "Runs", "Spec", "in_elements", "matches", "outputs", "totals"]
