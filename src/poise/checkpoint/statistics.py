"""What the entries of a tensor are like, in one pass over its rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .checkpoint import Checkpoint, count_rows

TILE_BYTES = 32 * 2**20  # of float64 rows at a time
BEYOND = 6.0  # times the root mean square, from where an entry counts as an outlier: in a normal one, 2 in a billion are
SPAN, BARS = 8.0, 64  # a histogram reaches so many RMS to either side, in so many bars


@dataclass(frozen=True)
class Statistics:
    """The entries of one tensor. What has no value, as the mean of no entries, is nan.

    Attributes:
        count: entries, of which `nan` and `inf` are left out of everything below, and `zeros` are exactly 0.
        min, max, mean: as said.
        std: root of the mean squared distance from the mean.
        rms: root of the mean square.
        norm: root of the sum of squares (Frobenius).
        kurtosis: mean fourth power of the distance from the mean over std^4; 3 for a normal distribution.
        largest: largest absolute entry over rms.
        beyond: share of entries of at least 6 rms, that bound rounded to the nearest number with 8 significant bits.
        zero_rows, zero_columns: places of the first, and of the last, dimension where every entry is 0; 0 below two dimensions.
        first_bad: index of the first entry that is nan or infinite; None where all are finite.
        histogram: share of entries in `BARS` bars between -8 and 8 rms, the outermost two holding all beyond; empty where rms
            is 0 or nan.
    """

    count: int
    nan: int
    inf: int
    zeros: int
    min: float
    max: float
    mean: float
    std: float
    rms: float
    norm: float
    kurtosis: float
    largest: float
    beyond: float
    zero_rows: int
    zero_columns: int
    first_bad: tuple[int, ...] | None = None
    histogram: tuple[float, ...] = field(default=(), repr=False)


def statistics(checkpoint: Checkpoint, name: str, tile_bytes: int = TILE_BYTES) -> Statistics:
    """Statistics of one tensor, read once, `tile_bytes` at a time; integers and booleans count as the numbers they are."""
    info = checkpoint.info(name)
    return gather(tiles(checkpoint, name, tile_bytes), info.shape)


def tiles(checkpoint: Checkpoint, name: str, tile_bytes: int = TILE_BYTES) -> Iterator[Tensor]:
    """A tensor's rows, as many at once as take `tile_bytes` in float64."""
    shape = checkpoint.info(name).shape
    rows = count_rows(shape)
    step = max(1, tile_bytes // max(1, 8 * (shape.numel() // max(1, rows))))
    for start in range(0, rows, step):
        yield checkpoint.rows(name, start, min(rows, start + step))


def gather(parts: Iterable[Tensor], shape: torch.Size) -> Statistics:
    """Statistics of a tensor of `shape` that comes in rows."""
    moments, spread = Moments(), Spread()
    nan = inf = zeros = zero_rows = taken = 0
    columns: Tensor | None = None
    first_bad: tuple[int, ...] | None = None
    for part in parts:
        rows = torch.view_as_real(part).flatten(-2) if part.is_complex() else part
        matrix = rows.reshape(len(rows), -1, rows.shape[-1]) if rows.ndim > 1 and rows.numel() else None
        wide = rows.reshape(-1).double()
        nonzero = wide != 0
        finite = wide.isfinite()
        zeros += int((~nonzero).sum())
        if not bool(finite.all()):
            if first_bad is None:
                flat = taken + int((~finite).int().argmax())
                first_bad = tuple(int(i) for i in np.unravel_index(flat, tuple(shape))) if not part.is_complex() else ()
            nan += int(wide.isnan().sum())
            inf += int(wide.isinf().sum())
            wide = wide[finite]
        if matrix is not None:
            seen = nonzero.view(matrix.shape)
            zero_rows += int((~seen.flatten(1).any(1)).sum())
            some = seen.flatten(0, 1).any(0)
            columns = some if columns is None else columns | some
        taken += rows.numel()
        moments.add(wide)
        spread.add(wide)
    rms = math.sqrt(moments.squares / moments.count) if moments.count else math.nan
    std = math.sqrt(moments.m2 / moments.count) if moments.count else math.nan
    biggest = max(abs(moments.low), abs(moments.high)) if moments.count else math.nan
    scaled = rms > 0 and math.isfinite(rms)
    return Statistics(
        count=taken,
        nan=nan,
        inf=inf,
        zeros=zeros,
        min=moments.low if moments.count else math.nan,
        max=moments.high if moments.count else math.nan,
        mean=moments.mean if moments.count else math.nan,
        std=std,
        rms=rms,
        norm=math.sqrt(moments.squares),
        kurtosis=kurtosis(moments),
        largest=biggest / rms if scaled else math.nan,
        beyond=spread.beyond(BEYOND * rms) / moments.count if scaled else math.nan,
        zero_rows=zero_rows,
        zero_columns=0 if columns is None else int((~columns).sum()),
        first_bad=first_bad,
        histogram=spread.histogram(rms) if scaled else (),
    )


def kurtosis(moments: Moments) -> float:
    squares = moments.m2 * moments.m2
    return moments.count * moments.m4 / squares if 0 < squares < math.inf else math.nan


class Moments:
    """Count, extremes, sum of squares and central moments, in float64.

    Each part's moments are taken about its own mean, then joined to those before, which loses no digits where the mean is large
    beside the deviation, as sums of powers would. Joining: "Formulas for Robust, One-Pass Parallel Computation of Covariances
    and Arbitrary-Order Statistical Moments" (Pebay, 2008).
    """

    def __init__(self) -> None:
        self.count = 0
        self.low, self.high = math.inf, -math.inf
        self.mean = self.squares = self.m2 = self.m3 = self.m4 = 0.0

    def add(self, values: Tensor) -> None:
        n = values.numel()
        if not n:
            return
        low, high = (float(value) for value in values.aminmax())
        mean = float(values.mean())
        d = values - mean
        d2 = d * d
        m2, m3, m4 = float(d2.sum()), float((d2 * d).sum()), float((d2 * d2).sum())
        self.squares += float(torch.dot(values, values))
        self.low, self.high = min(self.low, low), max(self.high, high)
        a, total = self.count, self.count + n
        gap = mean - self.mean
        gap2 = gap * gap  # not gap**2, which raises where this is infinite
        self.m4 += m4 + gap2 * gap2 * a * n * (a * a - a * n + n * n) / total**3
        self.m4 += 6 * gap2 * (a * a * m2 + n * n * self.m2) / total**2 + 4 * gap * (a * m3 - n * self.m3) / total
        self.m3 += m3 + gap2 * gap * a * n * (a - n) / total**2 + 3 * gap * (a * m2 - n * self.m2) / total
        self.m2 += m2 + gap2 * a * n / total
        self.mean += gap * n / total
        self.count = total


class Spread:
    """How entries are spread over the numbers, before it is known which of them will be large: a count for each bfloat16.

    Between two bfloat16 numbers lie 1/128 to 1/256 of either, so any bound is met to that, with 65536 counts for any tensor.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(65536, dtype=torch.int64)

    def add(self, values: Tensor) -> None:
        limit = torch.finfo(torch.float32).max
        bits = values.clamp(-limit, limit).float().view(torch.int32) >> 16  # towards zero
        self.counts += torch.bincount((bits & 0xFFFF).long(), minlength=65536)

    def beyond(self, bound: float) -> int:
        """Entries of at least `bound` in absolute value, that rounded to the nearest bfloat16."""
        edge = int(torch.tensor(bound, dtype=torch.float64).bfloat16().view(torch.int16)) & 0x7FFF
        both = self.counts[:32768] + self.counts[32768:]
        return int(both[edge:].sum())

    def histogram(self, rms: float) -> tuple[float, ...]:
        """Shares in bars of equal width; an entry is taken to lie anywhere between its bfloat16 and the next."""
        positive = self.counts[:32768].double().numpy()
        negative = self.counts[32768:].double().numpy()
        edges = torch.arange(32768, dtype=torch.int32).short().view(torch.bfloat16).double()[: 0x7F80 + 1].numpy()
        edges[-1] = torch.finfo(torch.float32).max
        zeros = positive[0] + negative[0]
        positive[0] = negative[0] = 0
        bars = np.linspace(-SPAN, SPAN, BARS + 1) * rms
        up = np.interp(bars.clip(min=0), edges, np.concatenate([[0.0], positive[:0x7F80].cumsum()]))
        down = np.interp((-bars).clip(min=0), edges, np.concatenate([[0.0], negative[:0x7F80].cumsum()]))
        below = up - down
        shares = np.diff(below)
        shares[0] += negative.sum() - down[0]
        shares[-1] += positive.sum() - up[-1]
        shares[BARS // 2 - 1 : BARS // 2 + 1] += zeros / 2
        return tuple(float(share) for share in shares / (positive.sum() + negative.sum() + zeros))
