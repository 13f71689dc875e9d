"""Steps that are best in a norm: the update becomes the point of the norm's unit ball that goes furthest along it.

chain(momentum(0.95, average=True), lmo("spectral"))       a Muon
chain(momentum(0.9, average=True), lmo("linf"))            Signum
chain(sharp("spectral"))                                   gradient descent in the spectral norm
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from poise.linalg import norms, polar

from ..transform import Context, Param, State, Transform
from .sign import sign
from .spectral import by_matrix, matrices, orthogonal_rms, orthogonalize
from .step import identity

MATRIX_NORMS = ("spectral", "nuclear", "l21", "l2inf")  # of rows and columns; the others are of entries, whatever their shape
LMO_NORMS = (*norms.NORMS, "global_l2")


def lmo(norm: str = "spectral", method: str = "polar_express", steps: int | None = None) -> Transform:
    """A link that replaces the update by the norm's linear minimization oracle: `u <- argmax over ||z|| <= 1 of <u, z>`.

    Every step then has norm lr, in the norm that was chosen, however large the gradient. Zero stays zero.

    Args:
        norm: of matrices `"spectral"` (the polar factor), `"nuclear"`, `"l21"`, `"l2inf"`; of all entries of a parameter
            `"linf"` (the sign), `"l2"`, `"l1"`; `"global_l2"` is the length of all parameters of the link together. See
            `poise.linalg.norms`. The parts of a fused projection are matrices of their own, as for `orthogonalize`.
        method, steps: of the polar factor; see `poise.linalg.polar.orthogonalize`.

    Raises:
        ValueError: for a norm or options that are not known.
    """
    check_lmo(norm, method, steps)
    if norm == "spectral":
        return orthogonalize(method, steps)
    if norm == "linf":
        return sign()
    if norm == "global_l2":
        return unit_length()
    return (matrix_step if norm in MATRIX_NORMS else entry_step)(norm, method, steps, sharp=False)


def sharp(norm: str = "spectral", method: str = "polar_express", steps: int | None = None) -> Transform:
    """A link that replaces the update by the norm's sharp operator: `u <- <u, O> O` with `O = lmo(u)`.

    The direction of `lmo`, as long as the update is in the dual norm, so that steps shrink with the gradient: the maximum of
    `<u, z> - ||z||^2 / 2`. For `"spectral"` it is the nuclear norm of u times its polar factor.

    Args:
        norm, method, steps: as for `lmo`, without `"global_l2"`, whose sharp operator is the identity, as that of `"l2"` is.

    Raises:
        ValueError: for a norm or options that are not known.
    """
    norms.check_norm(norm)
    check_lmo(norm, method, steps)
    if norm == "l2":
        return identity()
    return (matrix_step if norm in MATRIX_NORMS else entry_step)(norm, method, steps, sharp=True)


def check_lmo(norm: str, method: str = "polar_express", steps: int | None = None) -> None:
    """Raise ValueError for a norm or options that `lmo` does not know."""
    if norm not in LMO_NORMS:
        raise ValueError(f"norm={norm!r}: must be one of {', '.join(LMO_NORMS)}")
    polar.check_options(method, steps, "auto", None)


class matrix_step(Transform):
    """`lmo` or `sharp` of each matrix that a parameter is made of; made by these two functions."""

    unit = "matrix"
    blind = True

    def __init__(self, norm: str, method: str, steps: int | None, sharp: bool) -> None:
        self.norm, self.method, self.steps, self.sharp = norm, method, steps, sharp

    def best(self, u: Tensor) -> Tensor:
        """The step of a batch of matrices."""
        return (norms.sharp if self.sharp else norms.lmo)(u, self.norm, self.method, steps=self.steps)

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return by_matrix(self.best, k.param, u)

    def update_rms(self, p: Param) -> float | None:
        if self.sharp or p.shape.numel() == 0:
            return None
        if self.norm == "l2inf":  # every row has length 1
            return 1 / math.sqrt(p.matrix[1])
        if self.norm == "spectral":
            return orthogonal_rms(p, lambda m, n: 1.0)
        experts = p.shape[0] if p.role == "experts" else 1
        return math.sqrt(len(matrices(p)) * experts / p.shape.numel())  # every matrix has length 1

    def __repr__(self) -> str:
        return f"{'sharp' if self.sharp else 'lmo'}({self.norm!r}, {self.method!r}, steps={self.steps})"


class entry_step(matrix_step):
    """The same for norms that know no rows and columns: of all entries of a parameter."""

    unit = "tensor"

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return self.best(u.reshape(1, -1)).reshape(u.shape)

    def update_rms(self, p: Param) -> float | None:
        return None if self.sharp or p.shape.numel() == 0 else 1 / math.sqrt(p.shape.numel())


class unit_length(Transform):
    """`u <- u / N` with `N = sqrt(sum over all parameters of ||u||^2)`, or 0 where N is 0.

    The sum runs over every parameter whose rule holds this very object, on all ranks, each element once, in float64.
    """

    reads = "update"

    def measure(self, u: Tensor, state: State, x: Tensor, k: Context) -> dict[str, Tensor]:
        return {"squared": u.double().square().sum()}

    def reduce(self, totals: dict[str, Tensor], shared: State, k: Context) -> dict[str, Tensor]:
        length = totals["squared"].sqrt()
        return {"length": torch.where(length > 0, length, 1.0)}

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return u / k.total["length"]


__all__ = ["LMO_NORMS", "MATRIX_NORMS", "check_lmo", "lmo", "matrix_step", "sharp", "unit_length"]
