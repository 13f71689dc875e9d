"""What OTA merging must know of whole tensors: compressed second moments, thresholds, norms of masked task vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .blocks import Blocks
from .protocol import Each, Observer, Place
from .selection import Largest
from .task_vectors import deltas, each

Average = Literal["precond", "linear", "ties"]
Compress = Literal["none", "rank1"] | int
EMBEDDINGS = ("embed", "wte", "wpe", "lm_head")


def is_embedding(name: str) -> bool:
    return any(part in name for part in EMBEDDINGS)


@dataclass
class Factors:
    """A matrix of second moments, compressed: of rank 1 two vectors, of rank r the r right singular vectors."""

    rows: Tensor | None = None
    columns: Tensor | None = None
    right: Tensor | None = None
    gram: Tensor | None = None

    def expand(self, v: Tensor, start: int) -> Tensor:
        """The compressed form of rows of v."""
        if self.rows is not None and self.columns is not None:
            return self.rows[start : start + len(v), None] * self.columns
        assert self.right is not None
        # one row after another: a product of matrices may round differently where it has other rows beside
        right = [row @ self.right for row in v.double().clone().unbind()]
        found = [self.right @ row for row in right]
        return torch.stack(found).clamp(min=0) if found else v.double()


@dataclass
class Measured:
    """Of one tensor and model."""

    factors: Factors | None = None
    mean: float = 1.0  # of v^power
    whole: Tensor | float = 0.0  # Gram matrix, column sums of squares, or sum of squares of tau
    masked: Tensor | float = 0.0


@dataclass(frozen=True)
class Curved:
    """What is known at the rows of a place."""

    place: Place
    look: Curvature

    def taus(self, tensors: Sequence[Tensor], base: Tensor | None) -> list[Tensor] | None:
        """Task vectors; without a base there are none."""
        return self.look.taus(tensors, base)

    def moments(self, v: Sequence[Tensor]) -> list[Tensor]:
        """The second moments in float64, compressed if they are to be."""
        return [self.look.expand(self.place, i, one) for i, one in enumerate(v)]

    def masks(self, v: Sequence[Tensor], taus: Sequence[Tensor] | None) -> list[Tensor]:
        """Where each model's score is among the largest, or above its threshold; bool. `v` as `moments` gives it."""
        return [self.look.mask(self.place, i, *one) for i, one in enumerate(zip(v, taus or [None] * len(v), strict=True))]

    def mean(self, model: int) -> float:
        """Of v^power over the tensor."""
        return self.look.of(self.place, model).mean

    def scale(self, model: int) -> float:
        """Norm of the task vector over that of the masked one; 0 where next to nothing is left."""
        found = self.look.of(self.place, model)
        before, after = _norm(found.whole), _norm(found.masked)
        return before / after if after > 1e-6 * before else 0.0

    def trimmed(self, model: int, tau: Tensor) -> Tensor:
        return self.look.trim.mask(self.place, model, tau)


class Curvature(Observer[Curved]):
    """Goes over the models once for each thing that is asked for, thresholds in three rounds; none, if nothing is."""

    def __init__(
        self,
        count: int,
        density: Each[float] = 1.0,
        compress: Compress = "none",
        divide_by_mean: bool = False,
        rescale: bool = False,
        average: Average = "precond",
        trim: float = 1.0,
    ) -> None:
        if average not in get_args(Average):
            raise ValueError(f"average={average!r}: must be one of {', '.join(map(repr, get_args(Average)))}")
        if compress not in ("none", "rank1") and not (isinstance(compress, int) and compress >= 1):
            raise ValueError(f"compress={compress!r}: must be 'none', 'rank1', or a rank of at least 1")
        self.count, self.compress, self.select = count, compress, density != 1.0
        self.needs_base = f"average={average!r}, rescale={rescale}" if rescale or average != "precond" else None
        self.measured: dict[tuple[str, int], Measured] = {}
        self.largest, self.trim = Largest(count), Largest(count, "tensor")
        self._blocks = Blocks()
        self._schedule: list[tuple[Callable[..., None], int]] = []
        if compress != "none":
            self._schedule.append((self._see_factors, 0))
        if divide_by_mean:
            self._schedule.append((self._see_means, 0))
        if self.select:
            self._schedule += [(self._see_scores, i) for i in range(Largest.rounds)]
        if rescale:
            self._schedule.append((self._see_norms, 0))
        if average == "ties" and trim < 1:
            self._schedule += [(self._see_trims, i) for i in range(Largest.rounds)]
        self.rounds = len(self._schedule)

    def see(
        self, round: int, place: Place, tensors: Sequence[Tensor], base: Tensor | None, settings: Mapping[str, Any]
    ) -> None:
        step, number = self._schedule[round]
        moments = checked(place, settings.get("moments"), len(tensors))
        step(number, place, moments, self.taus(tensors, base), settings)

    def close(self, round: int) -> None:
        step, number = self._schedule[round]
        if step == self._see_scores:
            self.largest.close(number)

    def answer(self, place: Place) -> Curved:
        return Curved(place, self)

    # -- what is asked of it when all is seen, or so far ---------------------------------------------------------------

    def taus(self, tensors: Sequence[Tensor], base: Tensor | None) -> list[Tensor] | None:
        if base is None and self.needs_base is not None:
            raise ValueError(f"ota: {self.needs_base}: without a base there are no task vectors")
        return None if base is None else deltas(tensors, base)

    def expand(self, place: Place, model: int, v: Tensor) -> Tensor:
        found = self.measured.get((place.name, model))
        if found is None or found.factors is None:
            return v.double()
        return found.factors.expand(v, place.start)

    def mask(self, place: Place, model: int, v: Tensor, tau: Tensor | None) -> Tensor:
        return self.largest.mask(place, model, score(v, tau)) if self.select else torch.ones_like(v, dtype=torch.bool)

    # -- rounds --------------------------------------------------------------------------------------------------------

    def of(self, place: Place, model: int) -> Measured:
        return self.measured.setdefault((place.name, model), Measured())

    def _see_factors(self, _: int, place: Place, v: list[Tensor], taus: list[Tensor] | None, settings: Any) -> None:
        if len(place.shape) != 2 or (self.compress != "rank1" and is_embedding(place.name)):
            return
        for here, parts in self._blocks.cut(place, v):
            for i, part in enumerate(parts):
                found = self.of(place, i)
                factors = found.factors = found.factors or Factors()
                if self.compress == "rank1":
                    rows, sums = part.sum(1), part.sum(0)
                    factors.rows = rows if factors.rows is None else torch.cat([factors.rows, rows])
                    factors.columns = sums if factors.columns is None else factors.columns + sums
                else:
                    gram = part.mT @ part
                    factors.gram = gram if factors.gram is None else factors.gram + gram
                if here.start + len(part) == place.shape[0]:
                    self._finish(factors)

    def _finish(self, factors: Factors) -> None:
        if factors.columns is not None:
            total = factors.columns.sum()
            factors.columns = factors.columns / total if total > 0 else factors.columns
        elif factors.gram is not None:
            assert isinstance(self.compress, int)
            factors.right, factors.gram = torch.linalg.eigh(factors.gram).eigenvectors[:, -self.compress :].contiguous(), None

    def _see_means(self, _: int, place: Place, v: list[Tensor], taus: list[Tensor] | None, settings: Mapping[str, Any]) -> None:
        for here, parts in self._blocks.cut(place, v):
            for i, part in enumerate(parts):
                found = self.of(place, i)
                before = 0.0 if here.start == 0 else found.mean * place.shape.numel()
                power = self.expand(here, i, part).pow(settings.get("power", 0.5))
                found.mean = (before + float(power.sum())) / place.shape.numel()

    def _see_scores(self, number: int, place: Place, v: list[Tensor], taus: list[Tensor] | None, settings: Any) -> None:
        scores = [score(self.expand(place, i, one), taus[i] if taus is not None else None) for i, one in enumerate(v)]
        self.largest.see(number, place, scores, each(settings.get("density", 1.0), self.count, "density"))

    def _masked(self, place: Place, v: Sequence[Tensor], taus: Sequence[Tensor], settings: Mapping[str, Any]) -> list[Tensor]:
        masks = Curved(place, self).masks([self.expand(place, i, one) for i, one in enumerate(v)], taus)
        low = each(settings.get("threshold"), self.count, "threshold")
        for i, (mask, one) in enumerate(zip(masks, v, strict=True)):
            if (least := low[i]) is not None:
                mask &= above(self.expand(place, i, one), taus[i], least)
        return [tau * mask for tau, mask in zip(taus, masks, strict=True)]

    def _see_norms(self, _: int, place: Place, v: list[Tensor], taus: list[Tensor] | None, settings: Mapping[str, Any]) -> None:
        assert taus is not None
        for here, parts in self._blocks.cut(place, [*v, *taus, *self._masked(place, v, taus, settings)]):
            for i in range(self.count):
                found = self.of(place, i)
                found.whole = found.whole + _second(here, parts[self.count + i])
                found.masked = found.masked + _second(here, parts[2 * self.count + i])
                if here.start + len(parts[0]) == (place.shape[0] if place.shape else 1):
                    found.whole, found.masked = _norm(found.whole) ** 2, _norm(found.masked) ** 2

    def _see_trims(self, number: int, place: Place, v: list[Tensor], taus: list[Tensor] | None, settings: Any) -> None:
        assert taus is not None
        self.trim.see(number, place, self._masked(place, v, taus, settings), [settings.get("trim", 1.0)] * self.count)


def score(v: Tensor, tau: Tensor | None) -> Tensor:
    """sqrt(v tau^2), or sqrt(v): in the order of the scores, and small ones do not underflow."""
    root = v.double().sqrt()
    return (root if tau is None else root * tau.abs()).float()


def above(v: Tensor, tau: Tensor | None, threshold: float) -> Tensor:
    return (v if tau is None else v * tau.double().square()) >= threshold


def checked(place: Place, moments: Any, count: int) -> list[Tensor]:
    if moments is None or len(moments) != count:
        raise ValueError(f"moments: one mapping of second moments for each of {count} models is needed")
    for number, v in enumerate(moments):
        if bool((v < 0).any()) or bool(torch.isnan(v).any()):
            raise ValueError(
                f"moments of model {number}: {place.name!r} has entries below 0 or NaN; second moments have neither"
            )
    return list(moments)


def _second(place: Place, tau: Tensor) -> Tensor | float:
    """What the norm is read off: squares of columns for embeddings, the Gram matrix for other matrices, else squares."""
    if len(place.shape) < 2:
        return float(tau.square().sum())
    return tau.square().sum(0) if is_embedding(place.name) else tau.mT @ tau


def _norm(second: Tensor | float) -> float:
    """Up to a factor of the shape: spectral norm of a matrix, longest column of an embedding, length of a vector."""
    if not isinstance(second, Tensor):
        return math.sqrt(second)
    if second.ndim == 2:
        return math.sqrt(max(0.0, float(torch.linalg.eigvalsh(second)[-1])))
    return math.sqrt(float(second.max()))
