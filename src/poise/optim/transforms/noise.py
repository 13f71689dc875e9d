"""Learning rates by noise: how far apart the gradients of a layer are, and smaller steps where they are further."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from poise.linalg import norms

from ..transform import Context, Param, Slot, State, Transform

Noise = Literal["previous", "independent"]

CALIBRATED = 100  # steps after which alpha stands still, where it is not given


class noise_adaptive(Transform):
    r"""A layer's update, shortened by the noise of its gradients compared with the least noisy layer's.

    For each layer l (a parameter of unit "tensor"; `noise_adaptive_matrix` sees matrices), with G its gradient and G' another:

        H_l <- beta H_l + (1 - beta) ||G - G'||_*^2,   H_l = 0 at first
        a_l  = alpha / sqrt(alpha^2 + H_l)
        u   <- u sqrt(a_l / max a)

    The maximum runs over all parameters whose rule holds this very object and whose H is known: give layers that share a norm
    one object, and other layers another. The least noisy of them keep their updates to the bit.

    `||D||_*` is the dual of the norm whose steepest step `lmo` takes: `<D, lmo(D)>`, the largest `<D, X>` with `||X|| <= 1`. So
    the estimate follows from the direction, whatever the geometry: the nuclear norm for orthogonalized steps, the sum of
    absolute values for signs.

    Args:
        lmo: the links that make a step of a momentum, without state of their own. They stand before this one in the chain.
        beta: in [0, 1).
        noise: G' is the layer's "previous" gradient, kept as state, or that of an "independent" batch at the same weights,
            given by `opt.feed(independent_grad=...)` before each step.
        alpha: positive: the noise below which layers are alike. None: the median of sqrt(H_l) over the layers, as it is in
            each of the first 100 steps, and as it was in the last of these from then on.
        every: steps between looks at the noise. One costs as much as the step's own direction.

    State: the previous gradient, 1 value per element, and one number for each layer.

    Raises:
        ValueError: for a setting that is none of these.

    Source: "Noise-Adaptive Layerwise Learning Rates: Accelerating Geometry-Aware Optimization for Deep Neural Network Training"
    (arXiv 2510.14009). The choice of alpha by a median is ours.
    """

    unit = "tensor"

    def __init__(
        self,
        lmo: Sequence[Transform],
        beta: float = 0.9,
        noise: Noise = "previous",
        alpha: float | None = None,
        every: int = 1,
    ) -> None:
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"noise_beta={beta}: must be in [0, 1)")
        if noise not in get_args(Noise):
            raise ValueError(f"noise={noise!r}: must be one of {', '.join(map(repr, get_args(Noise)))}")
        if alpha is not None and not 0.0 < alpha < math.inf:
            raise ValueError(f"alpha={alpha}: must be positive and finite, or None for the median noise")
        if every < 1:
            raise ValueError(f"noise_every={every}: must be at least 1")
        self.lmo = tuple(lmo)
        self.noise: Noise = noise
        self.alpha, self.spacing = alpha, every
        self.feeds = ("independent_grad",) if noise == "independent" else ()
        self.defaults = {"noise_beta": beta}

    def slots(self, p: Param) -> dict[str, Slot]:
        slots = {"noise": Slot((), kind="nonneg")}
        if self.noise == "previous":
            slots["previous_grad"] = Slot(tuple(p.shape))
        if self.alpha is None:
            slots["noise_alpha"] = Slot((), kind="exact", shared=True)
        return slots

    def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float]:
        beta = float(hyper["noise_beta"])
        looked = step - (2 if self.noise == "previous" else 1)  # at its first step a layer has no previous gradient
        return {
            "keep": beta,
            "take": 1 - beta,
            "known": float(looked >= 0),
            "looks": float(looked >= 0 and looked % self.spacing == 0),
        }

    def measure(self, u: Tensor, state: State, x: Tensor, k: Context) -> dict[str, Tensor]:
        if k.looks and u.numel():
            other = state["previous_grad"] if self.noise == "previous" else k.independent_grad
            state["noise"] = k.keep * state["noise"] + k.take * self._dual_norm(u - other, x, k).square()
        if self.noise == "previous":
            state["previous_grad"] = u
        return {"noise": state["noise"] if k.known and u.numel() else torch.full_like(state["noise"], math.nan)}

    def _dual_norm(self, D: Tensor, x: Tensor, k: Context) -> Tensor:
        step = D
        for link in self.lmo:
            step = link.update(step, {}, x, k)
        return norms.inner(D.reshape(1, -1), step.reshape(1, -1))

    def reduce(self, totals: dict[str, Tensor], shared: State, k: Context) -> dict[str, Tensor]:
        noise = k.each["noise"]  # one layer that has gone to infinity must not stop the others
        least = torch.where(noise.isfinite(), noise, math.inf).amin()
        if self.alpha is not None:
            return {"least": least, "alpha": torch.full_like(least, self.alpha)}
        if k.clock <= CALIBRATED:
            median = torch.where(noise.isfinite(), noise, math.nan).sqrt().nanmedian()
            shared["noise_alpha"] = median.nan_to_num(0.0).to(shared["noise_alpha"].dtype)
        return {"least": least, "alpha": shared["noise_alpha"].to(least.dtype)}

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        noise, floor = k.own["noise"], k.total["alpha"].square()
        # a_l / max a, both of whose roots are taken at once; without noise anywhere, or knowledge of it, nothing changes
        ratio = torch.where(noise > k.total["least"], (floor + k.total["least"]) / (floor + noise), 1.0)
        return u * ratio**0.25

    def __repr__(self) -> str:
        inside = ", ".join(map(repr, self.lmo))
        return f"{type(self).__name__}([{inside}], noise={self.noise!r}, alpha={self.alpha}, every={self.spacing})"


class noise_adaptive_matrix(noise_adaptive):
    """`noise_adaptive` where the links of `lmo` see matrices."""

    unit = "matrix"
