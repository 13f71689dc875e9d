"""Pieces that the references of several rules for matrices share: in float64, every product written out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Polar Express (arXiv 2505.16932): its polynomials for singular values in [1e-3, 1], and the one that follows for ever.
EXPRESS = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
]
EXPRESS_END = (1.875, -1.25, 0.375)
# Dion (arXiv 2504.05295), of which Turbo-Muon takes the last four.
DYN5 = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]


def polar(matrix: Tensor, method: str, steps: int | None) -> Tensor:
    """The (nearly) orthogonal factor of one matrix, every product written out.

    The programs add 1e-7 to the norm against a division by zero; here zero returns zero and nothing is added.
    """
    if method == "svd":
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u @ vh
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    norm = torch.linalg.matrix_norm(x)
    if norm == 0:
        return matrix
    if method == "ns5":
        polynomials = [(3.4445, -4.7750, 2.0315)] * (steps or 5)
        x = x / norm
    elif method == "polar_express":
        safe = [(a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in EXPRESS]
        polynomials = [safe[i] if i < len(safe) else EXPRESS_END for i in range(steps or 5)]
        x = x / (1.01 * norm)
    elif method == "turbo4":
        polynomials = DYN5[-(steps or 4) :]
        x = torch.stack([row / math.sqrt(sum(abs(float(row @ other)) for other in x)) for row in x])
    else:
        raise ValueError(method)
    for a, b, c in polynomials:
        gram = x @ x.T
        x = a * x + b * (gram @ x) + c * (gram @ gram @ x)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def shape_factor(rows: int, columns: int, rule: str) -> float:
    """`original` is the release's, `match_rms` Moonlight's, `spectral` Scion's."""
    return {
        "original": math.sqrt(max(1.0, rows / columns)),
        "match_rms": 0.2 * math.sqrt(max(rows, columns)),
        "spectral": math.sqrt(rows / columns),
        "none": 1.0,
    }[rule]


def adamw(
    start: Tensor,
    grads: Sequence[Tensor | None],
    rates: Sequence[float],
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> Tensor:
    """AdamW of one parameter (arXiv 1711.05101), eps added to the corrected root."""
    w = start.double().clone()
    first, second, t = torch.zeros_like(w), torch.zeros_like(w), 0
    for rate, gradient in zip(rates, grads, strict=True):
        if gradient is None:
            continue
        g = gradient.double()
        t += 1
        first = betas[0] * first + (1 - betas[0]) * g
        second = betas[1] * second + (1 - betas[1]) * g**2
        step = first / (1 - betas[0] ** t) / ((second / (1 - betas[1] ** t)).sqrt() + eps)
        w = (1 - rate * weight_decay) * w - rate * step
    return w


def inverse_fisher(rows: Sequence[Tensor], m: int, damping: float, x: Tensor) -> Tensor:
    """`(damping I + 1/m sum g g^T)^(-1) x`, one gradient after another by Sherman and Morrison's formula."""
    known: list[tuple[Tensor, Tensor]] = []

    def solve(y: Tensor) -> Tensor:
        z = y / damping
        for v, d in known:
            z = z - v * (v @ y) / d
        return z

    for g in rows:
        v = solve(g)
        known.append((v, m + g @ v))
    return solve(x)
