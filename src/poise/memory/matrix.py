"""4-bit state whose second moments are scaled, or summed up, by rows and columns: formats that see a tensor whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from poise.catalog import Paper, method
from poise.memory.codec import CODECS, Codec, Kind, Part, check_kind, pack, unpack
from poise.memory.dynamic import Dynamic4

# Adds up, or takes the largest of, what each rank has found over its own rows; the identity for a tensor that is whole.
Over = Callable[[Tensor, Literal["sum", "max"]], Tensor]

PAPER = Paper("Memory Efficient Optimizers with 4-bit States", arxiv="2309.01507", year=2023)


@dataclass(frozen=True)
class MatrixCodec(Codec):
    """A format of tensors of two or more dimensions, each seen whole. Others, and other kinds, it leaves to `plain`.

    `parts` names tensors that follow axes of the slot (`Part.axes`), and codes, two to a byte, of rows as the engine cuts them.
    """

    block: int = 2
    fallback: int = 128

    def for_slot(self, kind: Kind, shape: tuple[int, ...]) -> Codec:
        return self if len(shape) > 1 and kind in self.kinds() else Dynamic4(self.fallback)

    def kinds(self) -> tuple[Kind, ...]:
        """What it encodes itself."""
        return ("nonneg",)

    def axes(self, dims: int) -> dict[str, tuple[int, ...]]:
        """Which axes of a slot of so many dimensions each stored tensor follows; codes are not among them."""
        raise NotImplementedError(f"{type(self).__name__}.axes")

    def encode_whole(self, x: Tensor, kind: Kind, rows: int, over: Over) -> dict[str, Tensor]:
        """float32 (local rows, ...) -> its parts, codes as int32 of x's shape. `rows` are those of all ranks together."""
        raise NotImplementedError(f"{type(self).__name__}.encode_whole")

    def decode_whole(self, parts: Mapping[str, Tensor], kind: Kind) -> Tensor:
        """The parts, codes unpacked to the slot's shape -> float32."""
        raise NotImplementedError(f"{type(self).__name__}.decode_whole")

    def bytes_per_element(self, kind: Kind) -> float:
        """Of a large matrix: what follows single axes does not count."""
        return Dynamic4(self.fallback).bytes_per_element(kind) if kind not in self.kinds() else 0.5


@method(
    "int4-rank1",
    family="memory",
    kind="codec",
    paper=PAPER,
    mutant=("torch.minimum(scale.to(found.device), along)", "along"),
)
@dataclass(frozen=True)
class Rank1(MatrixCodec):
    """4 bits, the paper's own: second moments of matrices under the smaller of their row's and their column's maximum.

        s_ij = min( max_j' v_ij', max_i' v_i'j ),    v_ij ~ (c_ij + 1) / 16 s_ij        (of more dimensions: over all axes)

    A row and a column that are both large make an entry's scale large; an outlier spoils neither its row nor its column, as it
    would spoil its block. There is no zero in the map, so that m / sqrt(v) stays bounded. "upper" takes the next value above.
    Signed state, and second moments of vectors, are stored in blocks, as by `Dynamic4`.

    Args:
        fallback: the block of those, 128.

    Source: "Memory Efficient Optimizers with 4-bit States" (arXiv 2309.01507). Where its kernels divide by a scale of zero,
    zero is stored as zero.
    """

    def kinds(self) -> tuple[Kind, ...]:
        return ("nonneg", "upper")

    def parts(self, kind: Kind) -> dict[str, Part]:
        check_kind(kind)
        return {"codes": Part(torch.uint8, 1)}

    def axes(self, dims: int) -> dict[str, tuple[int, ...]]:
        return {f"max{axis}": (axis,) for axis in range(dims)}

    def encode_whole(self, x: Tensor, kind: Kind, rows: int, over: Over) -> dict[str, Tensor]:
        x = torch.where(x < 0, 0.0, x)
        maxima = {}
        for axis in range(x.ndim):
            others = [d for d in range(x.ndim) if d != axis]
            found = x.amax(others) if x.numel() else x.new_zeros(x.shape[axis])
            maxima[f"max{axis}"] = found if axis == 0 else over(found, "max")
        scale = _scale(maxima, x.ndim)
        y = 16 * x / torch.where(scale > 0, scale, 1.0)
        place = torch.ceil(y) if kind == "upper" else torch.round(y)
        if kind == "upper":  # the division may have rounded down
            place = torch.where(place * (1 / 16) * scale < x, place + 1, place)
        codes = torch.where(y == y, place, 16.0).clamp(1, 16) - 1
        return {"codes": codes.to(torch.int32), **maxima}

    def decode_whole(self, parts: Mapping[str, Tensor], kind: Kind) -> Tensor:
        codes = parts["codes"]
        return (codes.to(torch.float32) + 1) * (1 / 16) * _scale(parts, codes.ndim)


def _scale(maxima: Mapping[str, Tensor], dims: int) -> Tensor:
    scale = torch.full((), torch.inf)
    for axis in range(dims):
        found = maxima[f"max{axis}"]
        along = found.view([-1 if d == axis else 1 for d in range(dims)])
        scale = torch.minimum(scale.to(found.device), along)
    return scale


@method(
    "int4-factored",
    family="memory",
    kind="codec",
    paper=PAPER,
    mutant=("mean = columns.mean()", "mean = columns.amax()"),
)
@dataclass(frozen=True)
class Factored4(MatrixCodec):
    """4-bit first moments; of second moments of matrices only the means of rows and columns, in float32.

        R_i = mean_j v_ij,  C_j = mean_i v_ij,    v_ij ~ R_i C_j / mean(C)

    Rows are the first dimension, columns all others together. What is decoded has the same means as what was stored, so that an
    average of squared gradients that is kept in this form is the averages of their row and column means, to rounding. Signed
    state, second moments of vectors and "upper" are stored in blocks of 4-bit codes, as by `Dynamic4`.

    Args:
        fallback: the block of those, 128.

    Source: "Memory Efficient Optimizers with 4-bit States" (arXiv 2309.01507), its factored variant.
    """

    def parts(self, kind: Kind) -> dict[str, Part]:
        check_kind(kind)
        return {}

    def axes(self, dims: int) -> dict[str, tuple[int, ...]]:
        return {"rows": (0,), "columns": tuple(range(1, dims))}

    def encode_whole(self, x: Tensor, kind: Kind, rows: int, over: Over) -> dict[str, Tensor]:
        return {"rows": x.flatten(1).mean(1), "columns": over(x.sum(0), "sum") / rows}

    def decode_whole(self, parts: Mapping[str, Tensor], kind: Kind) -> Tensor:
        columns = parts["columns"]
        mean = columns.mean()
        share = columns / torch.where(mean > 0, mean, 1.0)
        return parts["rows"].view(-1, *[1] * columns.ndim) * share

    def bytes_per_element(self, kind: Kind) -> float:
        return 0.0 if kind in self.kinds() else super().bytes_per_element(kind)


def packed(codes: Tensor) -> Tensor:
    """int32 codes of a slot -> uint8 (rows, bytes of a row), neighbours sharing a byte."""
    flat = codes.flatten(1)
    if flat.shape[1] % 2:
        flat = torch.nn.functional.pad(flat, (0, 1))
    return pack(flat.reshape(-1, 2)).reshape(len(flat), flat.shape[1] // 2)


def unpacked(stored: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse, int32."""
    rest = torch.Size(shape[1:]).numel()
    return unpack(stored.reshape(-1, 1)).reshape(shape[0], 2 * stored.shape[1])[:, :rest].reshape(shape)


CODECS["int4-rank1"] = Rank1()
CODECS["int4-factored"] = Factored4()

__all__ = ["Factored4", "MatrixCodec", "Over", "Rank1", "packed", "unpacked"]
