"""Slerp: from one model to another along a circle."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from poise.catalog import Paper, method, uniform
from poise.checkpoint import CheckpointError

from ..blocks import Blocks
from ..protocol import Observer, Place, observed
from ..task_vectors import combined

Norm = Literal["raw", "geodesic"]
Vectors = Literal["linear", "slerp"]
PARALLEL = 0.9995  # |cos| above which sin is too small to divide by


@dataclass
class Angle:
    """Two tensors: their product and lengths."""

    place: Place
    dot: float = 0.0
    squares: tuple[float, float] = (0.0, 0.0)

    @property
    def lengths(self) -> tuple[float, float]:
        return math.sqrt(self.squares[0]), math.sqrt(self.squares[1])

    @property
    def cos(self) -> float:
        a, b = self.lengths
        return min(1.0, max(-1.0, self.dot / (a * b)))


class Angles(Observer[Angle]):
    """<a, b>, |a| and |b| of every tensor, in float64."""

    def __init__(self) -> None:
        self._blocks, self._found = Blocks(), dict[str, Angle]()

    def see(
        self, round: int, place: Place, tensors: Sequence[Tensor], base: Tensor | None, settings: Mapping[str, Any]
    ) -> None:
        angle = self._found.setdefault(place.name, Angle(place))
        for _, (a, b) in self._blocks.cut(place, pair(tensors, base)):
            a, b = a.reshape(-1), b.reshape(-1)
            angle.dot += float(torch.dot(a, b))
            angle.squares = (angle.squares[0] + float(torch.dot(a, a)), angle.squares[1] + float(torch.dot(b, b)))

    def answer(self, place: Place) -> Angle:
        return self._found.get(place.name) or Angle(place)


@method(
    "slerp",
    family="merge",
    kind="merge",
    paper=Paper("Animating Rotation with Quaternion Curves", year=1985, url="https://doi.org/10.1145/325334.325242"),
    tune={"t": uniform(0.0, 1.0)},
    mutant=("math.sin((1 - t) * angle)", "math.sin(t * angle)"),
)
@observed(Angles)
def slerp(
    tensors: list[Tensor],
    base: Tensor | None = None,
    *,
    seen: Angle,
    t: float = 0.5,
    norm: Norm = "raw",
    vectors: Vectors = "linear",
) -> Tensor:
    """Spherical interpolation of two models, tensor by tensor.

        cos Omega = <a, b> / (|a| |b|);   theta = sin((1 - t) Omega) / sin Omega * a + sin(t Omega) / sin Omega * b

    Where |cos Omega| > 0.9995, or a tensor is zero and so has no direction, it is (1 - t) a + t b. Opposite tensors have no way
    between them but through zero, and are refused.

    Args:
        tensors: a and b; or b alone, a being the base.
        base: a, where one model is given; else not used.
        t: 0.5; 0 gives a, 1 gives b, both bit for bit.
        norm: "raw" (default) as above. "geodesic" turns the direction and takes (1 - t) |a| + t |b| for the length; they agree
            for equal lengths, and "raw" is the longer the more these differ.
        vectors: "linear" (default): tensors of one dimension or none, norms and biases, go straight. "slerp": as matrices.

    Raises:
        ValueError: not two models; t outside of [0, 1].
        CheckpointError: a tensor of one model is opposite to the other's.

    Warns where cos Omega < -0.98: the coefficients are above 2.5 and amplify what differs. What is not finite is so in the
    result too. Source: "Animating Rotation with Quaternion Curves" (Shoemake, SIGGRAPH 1985); thresholds and defaults are
    mergekit's, but for the zero and the opposite tensors, which it interpolates.
    """
    a, b = pair(tensors, base)
    if not 0 <= t <= 1:
        raise ValueError(f"t={t}: must be from 0 to 1")
    if norm not in get_args(Norm) or vectors not in get_args(Vectors):
        raise ValueError(f"norm={norm!r}, vectors={vectors!r}: must be 'raw' or 'geodesic', and 'linear' or 'slerp'")
    straight = [1 - t, t]
    long, wide = seen.lengths
    if (vectors == "linear" and len(seen.place.shape) < 2) or not (0 < long < math.inf and 0 < wide < math.inf):
        return combined([a, b], straight)
    if seen.cos < -PARALLEL:
        raise CheckpointError(
            f"the two models are opposite (cosine {seen.cos:.5f}), and the way between them goes through zero",
            tensor=seen.place.name,
            cure="merge this tensor with t of 0 or 1, or with another method",
        )
    if seen.cos < -0.98:
        warnings.warn(
            f"slerp: {seen.place.name!r} has cosine {seen.cos:.4f}: nearly opposite tensors amplify noise", stacklevel=2
        )
    if seen.cos > PARALLEL:
        return combined([a, b], straight)
    angle = math.acos(seen.cos)
    share = [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]
    if norm == "geodesic":
        length = (1 - t) * long + t * wide
        share = [share[0] * length / long, share[1] * length / wide]
    return combined([a, b], share)


def pair(tensors: Sequence[Tensor], base: Tensor | None) -> list[Tensor]:
    found = list(tensors) if len(tensors) == 2 or base is None else [base, *tensors]
    if len(found) != 2:
        raise ValueError(f"slerp: takes two models, or one and a base; these are {len(tensors)}")
    return found
