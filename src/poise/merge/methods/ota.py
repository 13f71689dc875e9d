"""OTA merging with Fast Fisher Grafting: every entry weighted by the second moment that Adam kept of its gradients."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from poise.catalog import Paper, choice, method, uniform

from ..curvature import Average, Compress, Curvature, Curved, above, checked
from ..protocol import Beside, Each, observed
from ..task_vectors import combined, each

Fallback = Literal["base", "mean"]


@method(
    "ota",
    family="merge",
    kind="merge",
    paper=Paper("Harnessing Optimization Dynamics for Curvature-Informed Model Merging", arxiv="2509.11167", year=2025),
    tune={"density": uniform(0.1, 1.0), "power": choice(0.25, 0.5, 1.0)},
    mutant=("v.pow(power) * scales[i]", "v.pow(power).reciprocal() * scales[i]"),
)
@observed(Curvature)
def ota(
    tensors: list[Tensor],
    base: Tensor | None = None,
    *,
    seen: Curved,
    moments: Beside | None = None,
    density: Each[float] = 1.0,
    threshold: Each[float | None] = None,
    power: float = 0.5,
    scale: Each[float] = 1.0,
    eps: float = 1e-26,
    divide_by_mean: bool = False,
    compress: Compress = "none",
    fallback: Fallback = "base",
    average: Average = "precond",
    rescale: bool = False,
    trim: float = 1.0,
) -> Tensor:
    """Task vectors averaged with weights of curvature, each kept only where its Fisher score is large.

        m_i = 1 where v_i tau_i^2 is among the largest of the whole model, else 0            (v_i alone without a base)
        p_i = m_i (v_i^power scale_i + eps);   theta = theta_0 + sum_i p_i tau_i / sum_i p_i

    With power 1 and v the true curvature this is the minimum of sum_i v_i (theta - theta_i)^2 / 2; Adam's v, a mean of squared
    gradients, is closer to its square, hence power 1/2. One factor on all v changes nothing.

    Args:
        base: theta_0. Without, the models themselves are averaged, and masked by v.
        moments: v_i of every model: state dicts, or `poise.merge.moments.SecondMoments` of a file.
        density: share of entries that are kept, over the whole model, 1. The authors' runs use 0.3 to 0.4.
        threshold: keep entries whose score is at least this; beside or in place of a density. None.
        power, scale: 1/2, and 1 for each model.
        eps: 1e-26, as in the authors' runs: it must be tiny beside v^power, and decides where all v are zero.
        divide_by_mean: divide v_i^power by its mean over the tensor; off.
        compress: v first as the product of its row and column sums ("rank1"), or its best approximation of a rank, entries
            below 0 set to 0 (not of embeddings); "none". Of matrices only.
        fallback: where every model is masked: "base" (default), or the plain "mean".
        average: "precond" (default) as above; "linear": sum_i m_i tau_i / T; "ties": the same sum over those that have the sign
            of sum_i m_i tau_i, that of 0 being +, again divided by T.
        rescale: give each masked task vector the norm it had: the spectral norm of matrices, the length of vectors, the longest
            column of embeddings. One left with 1e-6 of it is dropped.
        trim: for "ties", the share of each tensor's masked entries that stays, 1.

    Raises:
        ValueError: no second moments, or some below 0; "linear", "ties" or rescale without a base.
        CheckpointError: NaN where thresholds are sought.

    Read once more for each of compress, divide_by_mean, rescale, and three times for a density. A rank keeps, while a tensor is
    read, a square matrix of its columns; so does rescale. Source: "Harnessing Optimization Dynamics for Curvature-Informed
    Model Merging" (arXiv 2509.11167). In its code "linear" and "ties" do not mask, and entries count as masked when sum_i p_i
    is small.
    """
    count = len(tensors)
    if fallback not in get_args(Fallback):
        raise ValueError(f"fallback={fallback!r}: must be 'base' or 'mean'")
    if not power > 0 or eps < 0:
        raise ValueError(f"power={power}, eps={eps}: power must be above 0, eps not below")
    taus = seen.taus(tensors, base)
    vs = seen.moments(checked(seen.place, moments, count))
    masks = seen.masks(vs, taus)
    for i, low in enumerate(each(threshold, count, "threshold")):
        if low is not None:
            masks[i] &= above(vs[i], taus[i] if taus is not None else None, low)
    scales = each(scale, count, "scale")
    if average == "precond":
        weights = []
        for i, v in enumerate(vs):
            p = v.pow(power) * scales[i]
            weights.append((p / seen.mean(i) if divide_by_mean and seen.mean(i) > 0 else p) + eps)
        shares = _weighted(weights, masks)
    else:
        assert taus is not None
        shares = [mask.double() / count for mask in masks]
    if rescale:
        shares = [s * seen.scale(i) for i, s in enumerate(shares)]
    if average == "ties":
        assert taus is not None
        if trim < 1:
            shares = [s * seen.trimmed(i, taus[i] * masks[i]) for i, s in enumerate(shares)]
        total = sum((s * t for s, t in zip(shares, taus, strict=True)), torch.zeros_like(shares[0]))
        positive = total >= 0
        shares = [torch.where((t > 0) == positive, s, 0) for s, t in zip(shares, taus, strict=True)]
    if fallback == "mean" or base is None:
        alone = ~torch.stack(masks).any(0)
        shares = [torch.where(alone, 1 / count, s) for s in shares]
    return combined(tensors, shares, base)


def _weighted(weights: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
    """p_i / sum_j p_j over those that are not masked; all the same where their p are all 0."""
    live = [torch.where(mask, weight, 0) for weight, mask in zip(weights, masks, strict=True)]
    total = sum(live, torch.zeros_like(live[0]))
    left = sum((mask.double() for mask in masks), torch.zeros_like(live[0])).clamp(min=1)
    some = torch.where(total > 0, total, 1)
    return [torch.where(total > 0, p / some, mask / left) for p, mask in zip(live, masks, strict=True)]
