"""Adaptive scaling: the update is divided by a running root mean square of its own entries."""

# Every rule here is blind: it looks at the update alone. Driven in a rotated space, it needs no rotated gradient or weights.

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ..transform import Context, Param, Slot, State, Transform


class adam(Transform):
    """Adam's direction.

    `m <- b1 m + (1 - b1) u`, `v <- b2 v + (1 - b2) u^2`, result `(m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)`.

    Args:
        betas: `(b1, b2)`, each in [0, 1).
        eps: added to the root after bias correction, as PyTorch does.
        correct_bias: without it the result is `m / (sqrt(v) + eps)`; `debias` may follow.
        eps_at: the "uncorrected" root has eps added before bias correction: `sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps)`,
            as in the Adam of older releases of transformers, and of what was built on them.

    Source: "Adam: A Method for Stochastic Optimization" (arXiv 1412.6980).
    """

    blind = True

    def __init__(
        self,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        correct_bias: bool = True,
        eps_at: Literal["corrected", "uncorrected"] = "corrected",
    ) -> None:
        check_betas(betas)
        check_eps(eps)
        if eps_at not in ("corrected", "uncorrected"):
            raise ValueError(f"eps_at={eps_at!r}: must be 'corrected' or 'uncorrected'")
        self.correct_bias, self.eps_at = correct_bias, eps_at
        self.defaults = {"betas": tuple(betas), "eps": eps}

    def slots(self, p: Param) -> dict[str, Slot]:
        return {"exp_avg": Slot(tuple(p.shape)), "exp_avg_sq": Slot(tuple(p.shape), kind="nonneg")}

    def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float]:
        b1, b2 = map(float, hyper["betas"])
        root = (1 - b2**step) ** -0.5 if self.correct_bias else 1.0
        return {
            "b1": b1,
            "c1": 1 - b1,
            "b2": b2,
            "c2": 1 - b2,
            "debias1": 1 / (1 - b1**step) if self.correct_bias else 1.0,
            "debias2": root,
            "eps": float(hyper["eps"]) * (root if self.eps_at == "uncorrected" else 1.0),
        }

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        m = state["exp_avg"] = k.b1 * state["exp_avg"] + k.c1 * u
        v = state["exp_avg_sq"] = k.b2 * state["exp_avg_sq"] + k.c2 * (u * u)
        return k.debias1 * m / (v.sqrt() * k.debias2 + k.eps)

    def update_rms(self, p: Param) -> float:
        return (
            0.2  # of AdamW in mid-training, as quoted in "Muon is Scalable for LLM Training" (arXiv 2502.16982): the yardstick
        )


class factored_adam(Transform):
    r"""Adam's direction for matrices with the second moment kept as one number a row and one a column, without bias correction.

    `m <- b1 m + (1 - b1) u`; `r <- b2 r + (1 - b2) rowmean(u^2)`, `c <- b2 c + (1 - b2) columnmean(u^2)`;

        V_ij = max( r_i c_j / mean(r),  m_ij^2 / C ),   result  m / (sqrt(V) + eps)

    with `C = (1 - b1)^2 / (1 - b2) * sum_{s < t} (b1^2 / b2)^s`. The second moment that is not kept obeys `m_ij^2 <= C v_ij`
    (Cauchy-Schwarz over the weights of the two averages), so the bound only takes away what cannot be true. It matters where
    gradients repeat themselves: a constant diagonal gradient has `r_i c_i / mean(r) = (u_ii^2 / ||u||)^2`, far below u_ii^2,
    and its smallest entries would move the furthest; with the bound V is exact there if b1 = b2.

    Args:
        betas: `(b1, b2)`, each in [0, 1).
        eps: added to the root.

    State: 1 value per entry, and 1 for each row and column. Source: the factors are those of "Adafactor: Adaptive Learning
    Rates with Sublinear Memory Cost" (arXiv 1804.04235); the bound is ours.
    """

    unit = "matrix"
    blind = True

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        check_betas(betas)
        check_eps(eps)
        self.defaults = {"betas": tuple(betas), "eps": eps}

    def slots(self, p: Param) -> dict[str, Slot]:
        rows, columns = p.matrix
        experts = tuple(p.shape[:-2]) if p.role == "experts" else ()
        whole = (None,) * (len(experts) + 2)
        return {
            "exp_avg": Slot(tuple(p.shape)),
            "exp_avg_sq_row": Slot((*experts, rows, 1), kind="nonneg", dims=whole),
            "exp_avg_sq_col": Slot((*experts, 1, columns), kind="nonneg", dims=whole),
        }

    def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float]:
        b1, b2 = map(float, hyper["betas"])
        least = largest_ratio(b1, b2, step) ** -0.5
        return {"b1": b1, "c1": 1 - b1, "b2": b2, "c2": 1 - b2, "least": least, "eps": float(hyper["eps"])}

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        squares = u * u
        m = state["exp_avg"] = k.b1 * state["exp_avg"] + k.c1 * u
        row = state["exp_avg_sq_row"] = k.b2 * state["exp_avg_sq_row"] + k.c2 * squares.mean(-1, keepdim=True)
        col = state["exp_avg_sq_col"] = k.b2 * state["exp_avg_sq_col"] + k.c2 * squares.mean(-2, keepdim=True)
        # roots before the product, which would underflow where gradients are below 1e-10
        mean = row.mean(-2, keepdim=True).sqrt()
        root = row.sqrt() * (col.sqrt() / torch.where(mean > 0, mean, 1.0))
        return m / (torch.maximum(root, k.least * m.abs()) + k.eps)

    def update_rms(self, p: Param) -> float:
        return 0.2  # as adam's


class debias(Transform):
    """Adam's bias correction as a factor of its own: `u <- sqrt(1 - b2^t) / (1 - b1^t) u`.

    After `adam(correct_bias=False)` this is Adam with eps added to the uncorrected root.

    Args:
        betas: those of the rule it corrects.
        gathered: first calls that are not counted: t = calls - gathered.
    """

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999), gathered: int = 0) -> None:
        check_betas(betas)
        self.gathered = gathered
        self.defaults = {"betas": tuple(betas)}

    def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float]:
        b1, b2 = map(float, hyper["betas"])
        t = max(step - self.gathered, 1)  # of a call that only gathers nothing comes
        return {"correction": math.sqrt(1 - b2**t) / (1 - b1**t)}

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return k.correction * u


def largest_ratio(b1: float, b2: float, t: int) -> float:
    """The largest that `m^2 / v` can be after t steps of Adam's two averages: `sum over s < t of w1_s^2 / w2_s`.

    `w_s = (1 - b) b^s` are the weights of the gradient s steps back. Infinite where v forgets what m still knows.
    """
    if b2 == 0.0:
        return math.inf if b1 > 0 and t > 1 else (1 - b1) ** 2
    q, scale = b1 * b1 / b2, (1 - b1) ** 2 / (1 - b2)
    if q == 1.0:
        return scale * t
    try:
        return scale * (1 - q**t) / (1 - q)
    except OverflowError:
        return math.inf


def check_eps(eps: float) -> None:
    """Not negative, or ValueError."""
    if eps < 0:
        raise ValueError(f"eps={eps}: must not be negative")


def check_betas(betas: tuple[float, float]) -> None:
    """Both in [0, 1), or ValueError."""
    if len(betas) != 2 or not all(0.0 <= b < 1.0 for b in betas):
        raise ValueError(f"betas={betas}: two numbers in [0, 1) are needed")
