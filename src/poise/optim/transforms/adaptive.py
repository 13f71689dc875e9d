"""Adaptive scaling: the update is divided by a running root mean square of its own entries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..transform import Context, Param, Slot, State, Transform


class adam(Transform):
    """Adam's direction.

    `m <- b1 m + (1 - b1) u`, `v <- b2 v + (1 - b2) u^2`, result `(m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)`.

    Args:
        betas: `(b1, b2)`, each in [0, 1).
        eps: added to the root after bias correction, as PyTorch does.

    Source: "Adam: A Method for Stochastic Optimization" (arXiv 1412.6980).
    """

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        check_betas(betas)
        if eps < 0:
            raise ValueError(f"eps={eps}: must not be negative")
        self.defaults = {"betas": tuple(betas), "eps": eps}

    def slots(self, p: Param) -> dict[str, Slot]:
        return {"exp_avg": Slot(tuple(p.shape)), "exp_avg_sq": Slot(tuple(p.shape), kind="nonneg")}

    def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float]:
        b1, b2 = map(float, hyper["betas"])
        return {
            "b1": b1,
            "c1": 1 - b1,
            "b2": b2,
            "c2": 1 - b2,
            "debias1": 1 / (1 - b1**step),
            "debias2": (1 - b2**step) ** -0.5,
            "eps": float(hyper["eps"]),
        }

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        m = state["exp_avg"] = k.b1 * state["exp_avg"] + k.c1 * u
        v = state["exp_avg_sq"] = k.b2 * state["exp_avg_sq"] + k.c2 * (u * u)
        return k.debias1 * m / (v.sqrt() * k.debias2 + k.eps)

    def update_rms(self, p: Param) -> float:
        return (
            0.2  # of AdamW in mid-training, as quoted in "Muon is Scalable for LLM Training" (arXiv 2502.16982): the yardstick
        )


def check_betas(betas: tuple[float, float]) -> None:
    """Both in [0, 1), or ValueError."""
    if len(betas) != 2 or not all(0.0 <= b < 1.0 for b in betas):
        raise ValueError(f"betas={betas}: two numbers in [0, 1) are needed")
