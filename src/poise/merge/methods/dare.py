"""DARE: most of a task vector left out at random, the rest scaled up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from poise.catalog import Paper, method, uniform
from poise.memory import rounding

from ..blocks import Blocks
from ..election import Disjoint, agreeing, sign, votes
from ..protocol import Each, Observer, Place, observed
from ..task_vectors import combined, deltas, each, needed, normalized

Rescale = bool | Literal["l1"]
PAPER = Paper("Language Models are Super Mario", arxiv="2311.03099", year=2024)


def kept(place: Place, entries: int, seed: int, model: int, density: float) -> Tensor:
    """Which entries of rows stay, each with probability `density`: a function of seed, model, tensor and index in it."""
    first = place.start * place.per_row
    index = torch.arange(first, first + entries).to(torch.int32)  # mod 2^32
    return rounding.uniform(rounding.key_of(seed, place.name, salt=model), index) < density


@dataclass(frozen=True)
class Draw:
    """The masks of the rows at a place, and what the survivors are multiplied with."""

    place: Place
    seeds: tuple[tuple[int, int], ...]  # of each model: its seed and its number
    scales: list[float] | None
    majority: int = 0

    def factors(self, taus: Sequence[Tensor], weights: Sequence[float], density: Each[float], rescale: Rescale) -> list[Tensor]:
        """w_i times the scale where tau_i stays, else 0; float64."""
        found = []
        for i, (tau, (seed, model), k) in enumerate(zip(taus, self.seeds, each(density, len(taus), "density"), strict=True)):
            if not 0 < k <= 1:
                raise ValueError(f"density={k} at {self.place.name!r}: must be above 0 and at most 1; 0 would leave nothing")
            scale = self.scales[i] if self.scales is not None else 1 / k if rescale else 1.0
            mask = kept(self.place, tau.numel(), seed, model, k).reshape(tau.shape)
            found.append(mask.double() * (weights[i] * scale))
        return found


@dataclass
class Sums:
    """L1 norms of one tensor's task vectors, before and after."""

    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)


class Draws(Observer[Draw]):
    """Masks need nothing seen; rescaling to the L1 norm needs both norms."""

    def __init__(self, count: int, seed: Each[int] = 0, rescale: Rescale = True) -> None:
        if rescale not in (True, False, "l1"):
            raise ValueError(f"rescale={rescale!r}: must be True, False or 'l1'")
        self.count, self.l1 = count, rescale == "l1"
        # With a seed of its own, a model's mask does not hang on its place among the others.
        own = isinstance(seed, list | tuple)
        self.seeds = tuple((s, 0 if own else i) for i, s in enumerate(each(seed, count, "seed")))
        self.rounds = int(self.l1)
        self._blocks, self._sums = Blocks(), dict[str, Sums]()

    def see(
        self, round: int, place: Place, tensors: Sequence[Tensor], base: Tensor | None, settings: Mapping[str, Any]
    ) -> None:
        if self.l1 and round == 0:
            self._measure(place, deltas(tensors, needed(base, "dare")), settings.get("density", 1.0))

    def _measure(self, place: Place, taus: Sequence[Tensor], density: Each[float]) -> None:
        sums = self._sums.setdefault(place.name, Sums([0.0] * self.count, [0.0] * self.count))
        for here, parts in self._blocks.cut(place, taus):
            masks = Draw(here, self.seeds, None).factors(parts, [1.0] * self.count, density, False)
            for i, (part, mask) in enumerate(zip(parts, masks, strict=True)):
                sums.before[i] += float(part.abs().sum())
                sums.after[i] += float((part * mask).abs().sum())

    def answer(self, place: Place) -> Draw:
        return Draw(place, self.seeds, self._scales(place) if self.l1 else None)

    def _scales(self, place: Place) -> list[float]:
        sums = self._sums.get(place.name, Sums([0.0] * self.count, [0.0] * self.count))
        return [b / a if a > 0 else 1.0 for b, a in zip(sums.before, sums.after, strict=True)]


class ElectedDraws(Draws):
    """The sign that most entries are elected to have, too."""

    def __init__(self, count: int, seed: Each[int] = 0, rescale: Rescale = True) -> None:
        super().__init__(count, seed, rescale)
        self.rescale: Rescale = rescale
        self.balance, self.rounds = 0, self.rounds + 1

    def see(
        self, round: int, place: Place, tensors: Sequence[Tensor], base: Tensor | None, settings: Mapping[str, Any]
    ) -> None:
        if round < self.rounds - 1:
            super().see(round, place, tensors, base, settings)
            return
        taus, weights = deltas(tensors, needed(base, "dare_ties")), each(settings.get("weight", 1.0), self.count, "weight")
        total = votes(taus, super().answer(place).factors(taus, weights, settings.get("density", 1.0), self.rescale))
        self.balance += int((total > 0).sum()) - int((total < 0).sum())

    def answer(self, place: Place) -> Draw:
        drawn = super().answer(place)
        return Draw(place, drawn.seeds, drawn.scales, sign(self.balance))


@method(
    "dare_linear",
    family="merge",
    kind="merge",
    paper=PAPER,
    tune={"lambda_": uniform(0.0, 1.0), "density": uniform(0.01, 1.0)},
    mutant=("1 / k if rescale else 1.0", "1.0"),
)
@observed(Draws)
def dare_linear(
    tensors: list[Tensor],
    base: Tensor | None = None,
    *,
    seen: Draw,
    weight: Each[float] = 1.0,
    density: Each[float] = 1.0,
    rescale: Rescale = True,
    normalize: bool = False,
    lambda_: float = 1.0,
    seed: Each[int] = 0,
) -> Tensor:
    """Task arithmetic on task vectors of which each entry is dropped with probability p and the others divided by 1 - p.

        tau_i <- m_i tau_i / (1 - p),   m_i 1 with probability 1 - p, else 0;   theta = theta_0 + lambda sum_i w_i tau_i

    tau_i is the mean over seeds, and its square grows by 1 / (1 - p). This does little to small differences, as fine-tuning
    makes them (about 0.002 in the paper), and ruins a model whose weights changed much.

    Args:
        base: theta_0.
        weight: w, 1.
        density: 1 - p, 1. The authors use 0.1, down to 0.01.
        rescale: True (default) divides by 1 - p. "l1" multiplies so that the L1 norm of each tensor is what it was, as mergekit
            does: about the same for large tensors, and biased for small ones. False: the survivors as they are.
        normalize: divide by the sum of weights; off.
        lambda_: 1.
        seed: 0; models are told apart by their place. One for each model: the mask goes with the seed, in any order.

    Raises:
        ValueError: no base; a density outside of (0, 1].

    A mask is a function of seed, model, tensor and index: cut in rows, spread over processes or done again, it is the same.
    Source: "Language Models are Super Mario" (arXiv 2311.03099).
    """
    base = needed(base, "dare_linear")
    weights = list(each(weight, len(tensors), "weight"))
    if normalize:
        weights = normalized(weights, "dare_linear")
    factors = seen.factors(deltas(tensors, base), weights, density, rescale)
    return combined(tensors, [lambda_ * factor for factor in factors], base)


@method(
    "dare_ties",
    family="merge",
    kind="merge",
    paper=PAPER,
    tune={"lambda_": uniform(0.0, 2.0), "density": uniform(0.01, 1.0)},
    mutant=("agreeing(taus, factors, weights, seen.majority, disjoint)", "[f / len(factors) for f in factors]"),
)
@observed(ElectedDraws)
def dare_ties(
    tensors: list[Tensor],
    base: Tensor | None = None,
    *,
    seen: Draw,
    weight: Each[float] = 1.0,
    density: Each[float] = 1.0,
    rescale: Rescale = True,
    lambda_: float = 1.0,
    disjoint: Disjoint = "mean",
    seed: Each[int] = 0,
) -> Tensor:
    """As `dare_linear`, but signs are elected and those who agree averaged, as in `ties`; entries are dropped, not trimmed.

        tau_i <- m_i tau_i / (1 - p);   gamma = sign(sum_i w_i tau_i)
        theta = theta_0 + lambda * mean of tau_i over those i with sign(w_i tau_i) = gamma

    Args:
        disjoint: "mean" (default), "sum" or "max".
        weight, density, rescale, lambda_, seed: see `dare_linear`.

    Raises:
        ValueError: no base; a density outside of (0, 1].

    Source: "Language Models are Super Mario" (arXiv 2311.03099), "Resolving Interference When Merging Models" (arXiv
    2306.01708).
    """
    base = needed(base, "dare_ties")
    weights, taus = each(weight, len(tensors), "weight"), deltas(tensors, base)
    factors = seen.factors(taus, weights, density, rescale)
    shares = agreeing(taus, factors, weights, seen.majority, disjoint)
    return combined(tensors, [lambda_ * share for share in shares], base)
