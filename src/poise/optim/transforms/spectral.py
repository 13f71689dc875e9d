"""Links that act on an update as a matrix: orthogonalize it, and scale it by its shape.

For example, Muon is `chain(momentum(0.95, nesterov=True, average=True), orthogonalize(), shape_scale())`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from poise.linalg import polar

from ..transform import Context, Param, State, Transform

ScaleRule = Literal["original", "match_rms", "spectral", "none"]


def matrices(p: Param) -> list[tuple[int, int]]:
    """(rows, columns) of each matrix that a parameter is made of.

    One for a plain matrix; the parts, stacked by rows, for a fused projection. Convolutions are matrices (out, in * kernel);
    stacked experts are many of the shape of their last two dimensions.
    """
    if len(p.shape) < 2:
        raise ValueError(f"{p.name}: a matrix rule needs at least two dimensions, got shape {tuple(p.shape)}")
    rows, columns = p.matrix
    if p.splits and sum(p.splits) != rows:
        raise ValueError(f"{p.name}: splits {p.splits} must add up to its {rows} rows")
    return [(part, columns) for part in p.splits or (rows,)]


def by_matrix(f: Callable[..., Tensor], p: Param, *us: Tensor) -> Tensor:
    """`f(*us)` of each matrix that a parameter is made of; f takes batches of them and keeps their shape."""
    rows = [m for m, _ in matrices(p)]
    if len(set(rows)) == 1:  # equal parts, or just one, at once
        return f(*(u.unflatten(-2, (len(rows), rows[0])) for u in us)).flatten(-3, -2)
    parts = zip(*(u.split(rows, dim=-2) for u in us), strict=True)
    return torch.cat([f(*part) for part in parts], dim=-2)


def orthogonal_rms(p: Param, factor: Callable[[int, int], float]) -> float | None:
    """RMS of an entry when each matrix of p is exactly orthogonal, times its factor: `||O||_F^2 = min(m, n)`."""
    parts = matrices(p)
    entries = sum(m * n for m, n in parts)
    return math.sqrt(sum(factor(m, n) ** 2 * min(m, n) for m, n in parts) / entries) if entries else None


class orthogonalize(Transform):
    r"""The update replaced by its (nearly) orthogonal polar factor: `u <- U V^T` for `u = U diag(s) V^T`.

    All singular directions of the update then count alike, and its spectral norm is 1 whatever the gradient's scale. The parts
    of a fused projection (q, k and v stored as one, `k.param.splits`) are orthogonalized one by one.

    Args:
        method: `"polar_express"` (default: closest to exact for its price on ill-conditioned updates), `"ns5"` (Muon's own),
            `"dyn5"`, `"turbo4"` (one step less), `"qdwh"` or `"svd"` (exact); see `poise.linalg.polar.orthogonalize`.
        steps: iterations; None for the method's own number.
        form: `"plain"`, `"gram"` (less work for wide matrices) or `"auto"`.
        dtype: precision of the arithmetic; None for bfloat16 where the hardware multiplies it, else float32.

    Raises:
        ValueError: when built, for options that `poise.linalg.polar.orthogonalize` does not know; when run, for splits that do
            not add up to the rows.

    Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
    """

    unit = "matrix"
    blind = True

    def __init__(
        self,
        method: str = "polar_express",
        steps: int | None = None,
        form: polar.Form = "auto",
        dtype: torch.dtype | None = None,
    ) -> None:
        polar.check_options(method, steps, form, dtype)
        self.method, self.steps, self.dtype = method, steps, dtype
        self.form: polar.Form = form

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return by_matrix(self._polar, k.param, u)

    def _polar(self, u: Tensor) -> Tensor:
        return polar.orthogonalize(u, self.method, steps=self.steps, form=self.form, dtype=self.dtype)

    def update_rms(self, p: Param) -> float | None:
        return orthogonal_rms(p, lambda m, n: 1.0)

    def __repr__(self) -> str:
        return f"orthogonalize({self.method!r}, steps={self.steps}, form={self.form!r}, dtype={self.dtype})"


class unit_rms(Transform):
    """The update of each matrix divided by the root mean square of its entries: `u <- u / (1e-30 + RMS(u))`."""

    unit = "matrix"
    blind = True

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return u / (1e-30 + u.square().mean((-2, -1), keepdim=True).sqrt())

    def update_rms(self, p: Param) -> float:
        return 1.0


# Of an m x n matrix, rows = outputs.
SCALES: dict[ScaleRule, Callable[[int, int], float]] = {
    "original": lambda m, n: math.sqrt(max(1.0, m / n)),
    # An orthogonal m x n matrix has entry RMS 1/sqrt(max(m, n)): 0.2 for every shape, which is about AdamW's.
    "match_rms": lambda m, n: 0.2 * math.sqrt(max(m, n)),
    "spectral": lambda m, n: math.sqrt(m / n),
    "none": lambda m, n: 1.0,
}


def check_scale_rule(rule: ScaleRule) -> None:
    """A rule of `SCALES`, or ValueError."""
    if rule not in get_args(ScaleRule):
        raise ValueError(f"rule={rule!r} (scale_rule of an optimizer): must be one of {', '.join(get_args(ScaleRule))}")


def shape_factors(p: Param, rule: ScaleRule) -> list[float]:
    """The factor of each part of p."""
    return [SCALES[rule](m, n) for m, n in matrices(p)]


def shape_scaled(u: Tensor, p: Param, rule: ScaleRule) -> Tensor:
    """Each part of p's update times its factor."""
    if u.numel() == 0:
        return u
    factors = shape_factors(p, rule)
    if len(set(factors)) == 1:
        return u if factors[0] == 1.0 else u * factors[0]
    rows = [m for m, _ in matrices(p)]
    return u * torch.cat([u.new_full((m, 1), factor) for m, factor in zip(rows, factors, strict=True)])


class shape_scale(Transform):
    """An orthogonalized update times a factor that depends on its shape, m rows (outputs) by n columns.

    | rule        | factor                | meaning                                                                       |
    |-------------|-----------------------|-------------------------------------------------------------------------------|
    | `original`  | `sqrt(max(1, m / n))` | Muon's release                                                                |
    | `match_rms` | `0.2 sqrt(max(m, n))` | an entry has RMS 0.2 for every shape: lr and weight decay of AdamW carry over |
    | `spectral`  | `sqrt(m / n)`         | unit change from an RMS-normalized input to an RMS-normalized output          |
    | `none`      | 1                     | the spectral norm stays 1                                                     |

    The shape is that of the matrix that was orthogonalized: (out, in * kernel) for a convolution, where the release took the
    kernel's own two sides, each part's for a fused projection, one expert's for stacked experts.

    Raises:
        ValueError: when built, for an unknown rule.

    Sources: K. Jordan et al., "Muon" (2024) for `original`; "Muon is Scalable for LLM Training", arXiv 2502.16982 for
    `match_rms`; "Training Deep Learning Models with Norm-Constrained LMOs", arXiv 2502.07529 for `spectral`.
    """

    unit = "matrix"
    blind = True

    def __init__(self, rule: ScaleRule = "original") -> None:
        check_scale_rule(rule)
        self.rule: ScaleRule = rule

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return shape_scaled(u, k.param, self.rule)

    def update_rms(self, p: Param) -> float | None:
        return orthogonal_rms(p, SCALES[self.rule])

    def __repr__(self) -> str:
        return f"shape_scale({self.rule!r})"
