"""The minimum of a cubically regularized quadratic, from the eigendecomposition of its matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor

HALVINGS = 200  # of an interval of logarithms: more than float64 can tell apart


def cubic_step(values: Tensor, vectors: Tensor, g: Tensor, M: float) -> Tensor:
    """`argmin over h of <g, h> + <H h, h> / 2 + M ||h||^3 / 6` for `H = vectors diag(values) vectors^T`, convex or not.

        h = -(H + M r / 2 I)^-1 g,    r = ||h|| >= max(0, -2 lambda_min / M)

    r is the root of a decreasing function of one number, found by bisection. The hard case is where g has nothing along the
    eigenvectors of lambda_min < 0 and what the formula gives at the least r is shorter than r: then the rest of the length is
    along such an eigenvector, in either of its directions, which are equally good.

    Args:
        values: (n,), ascending, as `torch.linalg.eigh` gives them. vectors: (n, n).
        g: (n,).
        M: positive.

    Raises:
        ValueError: M is not positive.
    """
    if not M > 0:
        raise ValueError(f"M={M}: must be positive")
    c = (vectors.mT @ g).double().cpu()
    lam = values.double().cpu()
    least = float(lam[0])
    low = max(0.0, -2 * least / M)
    # with r = low + t, lambda + M r / 2 = gap + M t / 2: no difference of nearly equal numbers is left
    gap = lam - min(least, 0.0)

    def along(t: float) -> Tensor:
        below = gap + M * t / 2
        return torch.where(below > 0, -c / torch.where(below > 0, below, 1.0), torch.where(c == 0, 0.0, -torch.inf))

    def longer(t: float) -> bool:
        """Whether the step at r = low + t is longer than r."""
        return float(torch.linalg.vector_norm(along(t))) > low + t

    size = float(torch.linalg.vector_norm(c))
    if size == 0 and low == 0:
        return torch.zeros_like(g)
    if not longer(0.0):
        s = along(0.0)
        if low > 0:
            s[0] += math.sqrt(max(low**2 - float(s.square().sum()), 0.0))
        return vectors @ s.to(vectors)
    # ||s|| <= size / (M t / 2), which is t at the square root below: the root is not above it
    tiny = math.log(torch.finfo(torch.float64).tiny)
    left, right = tiny, max(math.log(2 * size / M) / 2, tiny)
    for _ in range(HALVINGS):
        middle = (left + right) / 2
        if middle in (left, right):
            break
        left, right = (middle, right) if longer(math.exp(middle)) else (left, middle)
    return vectors @ along(math.exp(right)).to(vectors)


__all__ = ["cubic_step"]
