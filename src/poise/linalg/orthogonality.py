"""How far from orthogonal an orthogonalized matrix is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from poise.catalog import Paper, method

from .newton_schulz import Form
from .polar import orthogonalize


@dataclass(frozen=True)
class OrthogonalizationError:
    """How far orthogonalized matrices are from exact ones; each field is a float64 tensor with one value per matrix."""

    spectral: Tensor  # delta = ||O - polar(M)||_2
    frobenius: Tensor  # ||O - polar(M)||_F / ||polar(M)||_F
    sigma_min: Tensor  # smallest singular value of O,
    sigma_max: Tensor  # and largest


@method(
    "orthogonalization-error",
    family="linalg",
    kind="diagnostic",
    paper=Paper("Beyond the Ideal: Analyzing the Inexact Muon Update", arxiv="2510.19933", year=2025),
    mutant=("spectral=torch.linalg.matrix_norm(O - exact, 2)", "spectral=torch.linalg.matrix_norm(O - exact)"),
)
def orthogonalization_error(
    M: Tensor,
    O: Tensor | str = "polar_express",
    *,
    steps: int | None = None,
    form: Form = "auto",
    dtype: torch.dtype | None = None,
) -> OrthogonalizationError:
    """How far an orthogonalized matrix is from the exact polar factor: spectral, Frobenius, and spread of singular values.

        delta = ||O - polar(M)||_2

    by singular value decompositions in float64 on the CPU. It is rounding for the exact methods, falls with the steps of
    `polar_express`, and for `ns5` settles at 0.318 however many steps it takes.

    The paper's theory of Muon with such errors couples them to its settings: the larger delta, from fewer steps or from lower
    precision, the smaller a learning rate and the larger a momentum it wants. `benchmarks/inexact_muon.py` sweeps all three on
    a task; `poise.optim.orthogonality` tells delta of an optimizer at work. To be looked at now and then: it costs far more
    than the step that it judges.

    Args:
        M: shape (..., rows, columns), not empty: what was orthogonalized.
        O: the result, of the same shape; or the name of the method that is to give it.
        steps, form, dtype: of that method, see `poise.linalg.polar.orthogonalize`.

    Raises:
        ValueError: the shapes differ, hold no matrix with entries, or options are given beside a result.

    Source: "Beyond the Ideal: Analyzing the Inexact Muon Update" (arXiv 2510.19933).
    """
    if M.ndim < 2 or M.numel() == 0:
        raise ValueError(f"orthogonalization_error(M, O): needs matrices with entries, got shape {tuple(M.shape)}")
    if isinstance(O, str):
        O = orthogonalize(M.detach(), O, steps=steps, form=form, dtype=dtype)
    elif (steps, form, dtype) != (None, "auto", None):
        raise ValueError(f"steps={steps}, form={form!r}, dtype={dtype}: belong to a method, but O is a result")
    if M.shape != O.shape:
        raise ValueError(f"orthogonalization_error(M, O): shapes {tuple(M.shape)} and {tuple(O.shape)} must be equal")
    O = O.detach().to("cpu", torch.float64)
    exact = orthogonalize(M.detach().to("cpu", torch.float64), "svd")
    sigma = torch.linalg.svdvals(O)
    norm = torch.linalg.matrix_norm(exact)
    return OrthogonalizationError(
        spectral=torch.linalg.matrix_norm(O - exact, 2),
        frobenius=torch.linalg.matrix_norm(O - exact) / torch.where(norm > 0, norm, 1.0),
        sigma_min=sigma[..., -1],
        sigma_max=sigma[..., 0],
    )
