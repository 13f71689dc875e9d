"""WARP: policies fine-tuned for a reward, merged on the sphere about their start, and pulled back towards it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from poise.catalog import Paper, method, uniform

from ..blocks import Blocks
from ..protocol import Observer, Place, observed
from ..task_vectors import combined, deltas, needed

Scope = Literal["layer", "tensor"]


class Products(Observer[Tensor]):
    """Scalar products of the task vectors with each other, of every layer; outside of layers, of every module."""

    def __init__(self, count: int, scope: Scope = "layer") -> None:
        if scope not in ("layer", "tensor"):
            raise ValueError(f"scope={scope!r}: must be 'layer' or 'tensor'")
        self.scope, self.count, self._blocks, self._found = scope, count, Blocks(), dict[str | int, Tensor]()

    def see(
        self, round: int, place: Place, tensors: Sequence[Tensor], base: Tensor | None, settings: Mapping[str, Any]
    ) -> None:
        found = self._found.setdefault(self._group(place), torch.zeros(self.count, self.count, dtype=torch.float64))
        for _, parts in self._blocks.cut(place, deltas(tensors, needed(base, "warp"))):
            flat = torch.stack([part.reshape(-1) for part in parts])
            found += flat @ flat.mT

    def answer(self, place: Place) -> Tensor:
        return self._found.get(self._group(place), torch.zeros(self.count, self.count, dtype=torch.float64))

    def _group(self, place: Place) -> str | int:
        if self.scope == "tensor":
            return place.name
        return place.layer if place.layer is not None else place.name.rpartition(".")[0]


@method(
    "warp",
    family="merge",
    kind="merge",
    paper=Paper("On the Benefits of Weight Averaged Rewarded Policies", arxiv="2406.16768", year=2024),
    tune={"eta": uniform(0.0, 1.0)},
    mutant=("share = 1 / (new + 1)", "share = 1 / len(products)"),
)
@observed(Products)
def warp(
    tensors: list[Tensor], base: Tensor | None = None, *, seen: Tensor, eta: float = 0.3, scope: Scope = "layer"
) -> Tensor:
    """The spherical mean of task vectors, of which a part is added to the start.

        delta_m = theta_m - theta_0;   cos Omega = <delta_1, delta_2> / (|delta_1| |delta_2|), over a layer
        delta = sin((1 - lambda) Omega) / sin Omega * delta_1 + sin(lambda Omega) / sin Omega * delta_2,    lambda = 1/2
        theta = theta_0 + eta delta

    A third model is merged into the mean of the first two with lambda = 1/3, and so on. Task vectors of runs that differ only
    in the order of their data are nearly orthogonal, and their linear mean is shorter than they are; this one is not. Weights
    themselves are nearly parallel, which is why it is not they that are turned.

    Args:
        base: theta_0, where the runs started.
        eta: 0.3. 1 gives the spherical mean, 0 the start.
        scope: one angle for each "layer" (default; embeddings, head and last norm on their own), or for each "tensor".

    Raises:
        ValueError: no base.

    Linear where sin Omega < 1e-6 or a task vector is zero. Of more than two models the order matters, a little. What is not
    finite is so in the result too. Source: "On the Benefits of Weight Averaged Rewarded Policies" (arXiv 2406.16768).
    """
    base = needed(base, "warp")
    shares = spherical_mean(seen)
    return combined(tensors, [eta * share for share in shares], base)


def spherical_mean(products: Tensor) -> list[float]:
    """Coefficients of vectors in their spherical mean, from their scalar products."""
    shares = torch.zeros(len(products), dtype=torch.float64)
    for new in range(len(products)):
        share = 1 / (new + 1)
        one = torch.zeros_like(shares)
        one[new] = 1
        old, fresh = turned(*(float(a @ products @ b) for a, b in ((shares, shares), (shares, one), (one, one))), share)
        shares = old * shares + fresh * one
    return shares.tolist()


def turned(aa: float, ab: float, bb: float, share: float) -> tuple[float, float]:
    """Coefficients of a and b `share` of the way from a to b, from <a, a>, <a, b> and <b, b>."""
    lengths = math.sqrt(max(aa, 0.0)) * math.sqrt(max(bb, 0.0))
    if not 0 < lengths < math.inf or share in (0.0, 1.0):
        return 1 - share, share
    angle = math.acos(min(1.0, max(-1.0, ab / lengths)))
    if math.sin(angle) < 1e-6:
        return 1 - share, share
    return math.sin((1 - share) * angle) / math.sin(angle), math.sin(share * angle) / math.sin(angle)
