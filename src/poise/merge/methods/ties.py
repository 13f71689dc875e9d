"""TIES-Merging: trim, elect a sign, average those who agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from poise.catalog import Paper, method, uniform

from ..election import Disjoint, agreeing, sign, votes
from ..protocol import Each, Observer, Place, observed
from ..selection import Largest, Scope
from ..task_vectors import combined, deltas, each, needed

DENSITY = 0.2


@dataclass(frozen=True)
class Trimmed:
    """What is kept of the task vectors at these rows, and the sign of the whole vector."""

    place: Place
    largest: Largest
    majority: int

    def factors(self, taus: Sequence[Tensor], weights: Sequence[float]) -> list[Tensor]:
        """w_i where tau_i is kept, else 0."""
        return [self.largest.mask(self.place, i, tau).double() * weights[i] for i, tau in enumerate(taus)]


class Trim(Observer[Trimmed]):
    """Thresholds of the trimming, exact, then the sign that most of the elected ones have."""

    rounds = Largest.rounds

    def __init__(self, count: int, trim_scope: Scope = "model") -> None:
        self.largest, self.balance, self.count = Largest(count, trim_scope), 0, count

    def see(
        self, round: int, place: Place, tensors: Sequence[Tensor], base: Tensor | None, settings: Mapping[str, Any]
    ) -> None:
        taus = deltas(tensors, needed(base, "ties"))
        self.largest.see(round, place, taus, each(settings.get("density", DENSITY), self.count, "density"))
        if round == self.rounds - 1:
            weights = each(settings.get("weight", 1.0), self.count, "weight")
            total = votes(taus, Trimmed(place, self.largest, 0).factors(taus, weights))
            self.balance += int((total > 0).sum()) - int((total < 0).sum())

    def close(self, round: int) -> None:
        self.largest.close(round)

    def answer(self, place: Place) -> Trimmed:
        return Trimmed(place, self.largest, sign(self.balance))


@method(
    "ties",
    family="merge",
    kind="merge",
    paper=Paper("Resolving Interference When Merging Models", arxiv="2306.01708", year=2023),
    tune={"lambda_": uniform(0.8, 2.5), "density": uniform(0.05, 1.0)},
    mutant=("agreeing(taus, factors, weights, seen.majority, disjoint)", "[f / len(factors) for f in factors]"),
)
@observed(Trim)
def ties(
    tensors: list[Tensor],
    base: Tensor | None = None,
    *,
    seen: Trimmed,
    weight: Each[float] = 1.0,
    density: Each[float] = DENSITY,
    lambda_: float = 1.0,
    disjoint: Disjoint = "mean",
    trim_scope: Scope = "model",
) -> Tensor:
    """Task vectors trimmed to their largest entries, and averaged over the models that agree with the elected sign.

        tau_i = theta_i - theta_0, but 0 outside of its floor(k d) largest entries of d
        gamma = sign(sum_i w_i tau_i), where that is 0 the sign of sum_p gamma_p over the whole model
        theta = theta_0 + lambda * mean of tau_i over those i with sign(w_i tau_i) = gamma

    Args:
        base: theta_0.
        weight: w, 1; the mean is weighted with it.
        density: k, 0.2. 1 trims nothing.
        lambda_: 1. With held-out data the authors choose it out of 0.8, 0.9, ..., 2.5.
        disjoint: "mean" (default), or "sum", or "max", the largest of those that agree.
        trim_scope: "model" (default): one threshold over all tensors; "tensor": one in each, as in mergekit.

    Raises:
        ValueError: no base; a density outside of [0, 1].
        CheckpointError: NaN in a model, with the tensor's name.

    The model is read three times before it is merged, in 512 KiB a model. Magnitudes are compared in float32; of equal ones the
    first are kept, tensors in order of their names. Source: "Resolving Interference When Merging Models" (arXiv 2306.01708).
    Its code keeps one entry more, all that equal the smallest kept, and cannot keep everything.
    """
    base = needed(base, "ties")
    weights, taus = each(weight, len(tensors), "weight"), deltas(tensors, base)
    factors = seen.factors(taus, weights)
    shares = agreeing(taus, factors, weights, seen.majority, disjoint)
    return combined(tensors, [lambda_ * share for share in shares], base)
