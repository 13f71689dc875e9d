"""GrokAlign: a penalty on the network's Jacobian, and two numbers that say how far its Jacobians are aligned with the data."""

from __future__ import annotations

import torch
from torch import Tensor

from poise.catalog import Paper, log_uniform, method
from poise.linalg.lengths import lengths, unit, wide

# Guards of the authors' code: of the squared norm under the root, and of the product of norms below a cosine.
FLOOR = 1e-8


@method(
    "grokalign",
    family="training",
    kind="loss",
    paper=Paper("GrokAlign: Geometric Characterisation and Acceleration of Grokking", arxiv="2506.12284", year=2025),
    tune={"strength": log_uniform(1e-5, 1.0)},
    mutant=("* outputs[0].numel()", ""),
)
def jacobian_penalty(
    outputs: Tensor,
    inputs: Tensor,
    strength: float = 1e-3,
    *,
    projections: int = 1,
    squared: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A loss term: how long the Jacobian of each sample's outputs is, `strength * mean over b of sqrt(max(q_b, 1e-8))`.

        q_b = D mean over p of ||J_b^T v_bp||^2            v_bp random of length 1, D outputs; on average ||J_b||_F^2

    Penalizing it aligns the Jacobians with the data, and the network generalizes long before weight decay would make it.

        x.requires_grad_()
        logits = model(x)
        loss = cross_entropy(logits, y) + jacobian_penalty(logits, x)

    Samples must not see each other (no batch norm in training mode). Costs one more backward pass for each projection, kept for
    the second derivatives that training needs.

    Args:
        outputs: (batch, ...), made from `inputs`.
        inputs: (batch, ...), with requires_grad before the forward pass; of a token model the output of its embedding.
        strength: 1e-3, published for cross-entropy; 1e-4 for squared errors, 1 for a toy of XOR.
        projections: random directions for each sample.
        squared: `mean of q_b`, without the root. The work it builds on has half of this; the authors' code has the root.
        generator: of the directions.

    Raises:
        ValueError: `outputs` do not come from `inputs`, their batches differ, `projections` is below 1, `strength` is negative.

    Source: "GrokAlign: Geometric Characterisation and Acceleration of Grokking" (arXiv 2506.12284) and its code.
    """
    if projections < 1:
        raise ValueError(f"projections={projections}: must be 1 or more")
    if not strength >= 0:
        raise ValueError(f"strength={strength}: must not be negative")
    _check(outputs, inputs)
    total = torch.zeros(len(outputs), dtype=wide(outputs).dtype, device=outputs.device)
    for _ in range(projections):
        v = torch.randn(outputs.shape, generator=generator, dtype=total.dtype, device=outputs.device)
        v = unit(v.flatten(1), floor=FLOOR).reshape(outputs.shape)
        total = total + _pulled(outputs, inputs, v, create_graph=True).square().sum(1)
    q = total / projections * outputs[0].numel()
    return strength * (q if squared else q.clamp_min(FLOOR).sqrt()).mean()


def centroid_alignment(outputs: Tensor, inputs: Tensor) -> Tensor:
    """How well each sample's Jacobian is aligned with the sample itself: `cos(mu_b, x_b)`, `mu_b = J_b^T 1`, a vector (batch,).

    mu_b, the gradient of the sum of the outputs, is the centroid of the linear region that the sample lies in. Watch
    `alignment.min()`, `.mean()` and `.max()`: they rise towards 1 as the network comes to generalize. Arguments and errors are
    those of `jacobian_penalty`; the graph of `outputs` is kept.
    """
    _check(outputs, inputs)
    mu, x = _pulled(outputs, inputs, torch.ones_like(outputs)), wide(inputs.detach()).flatten(1)
    product = lengths(mu, 1, 0.0) * lengths(x, 1, 0.0)
    return (mu * x).sum(1) / product.squeeze(1).clamp_min(FLOOR)


def rank_one_share(outputs: Tensor, inputs: Tensor) -> Tensor:
    """How much of each sample's Jacobian is its first singular direction: `s_1^2 / sum of s_i^2`, a vector (batch,).

    Close to 1 once the network generalizes; a zero Jacobian gives 0. It takes one backward pass for each output, and memory for
    batch times outputs times inputs: for small batches. Arguments and errors are those of `jacobian_penalty`; the graph of
    `outputs` is kept.
    """
    _check(outputs, inputs)
    flat = outputs.flatten(1)
    rows = []
    for d in range(flat.shape[1]):
        v = torch.zeros_like(flat)
        v[:, d] = 1
        rows.append(_pulled(outputs, inputs, v.reshape(outputs.shape)))
    squares = torch.linalg.svdvals(torch.stack(rows, dim=1)).square()
    total = squares.sum(1)
    return squares[:, 0] / torch.where(total > 0, total, 1)


def _pulled(outputs: Tensor, inputs: Tensor, v: Tensor, create_graph: bool = False) -> Tensor:
    """`J_b^T v_b` for each sample b, (batch, inputs)."""
    (found,) = torch.autograd.grad(
        outputs, inputs, v.to(outputs.dtype), retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    if found is None:
        raise ValueError("outputs were not made from inputs: give the very tensor that went into the forward pass")
    return wide(found).flatten(1)


def _check(outputs: Tensor, inputs: Tensor) -> None:
    if not inputs.requires_grad:
        raise ValueError("inputs do not require grad: call inputs.requires_grad_() before the forward pass")
    if not outputs.requires_grad:
        raise ValueError("outputs do not require grad: they were computed without a graph (no_grad, detach)")
    if outputs.ndim < 1 or inputs.ndim < 1 or len(outputs) != len(inputs) or outputs.numel() == 0:
        raise ValueError(
            f"outputs {tuple(outputs.shape)} and inputs {tuple(inputs.shape)} must share their first dimension and not be empty"
        )
