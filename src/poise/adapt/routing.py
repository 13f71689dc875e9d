"""A choice of few among several for each token: the largest of a softmax, how evenly it falls, and a loss that says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Route:
    """What was chosen for each token, of n.

    Attributes:
        probabilities: (..., n), the softmax over all.
        chosen: (..., k), the indices of the largest.
        weights: (..., n), those of the chosen divided by their sum, and zero elsewhere.
    """

    probabilities: Tensor
    chosen: Tensor
    weights: Tensor


def route(logits: Tensor, k: int) -> Route:
    """The k largest of `softmax(logits)`, divided by their sum: the softmax of the k largest logits alone.

    Args:
        logits: (..., n); minus infinity is never chosen before a number, and has weight 0.
        k: from 1 to n. Of equal logits, torch's `topk` says which.
    """
    largest, chosen = logits.topk(k, dim=-1)
    # Not a quotient of probabilities: those of the chosen may all be too small for the dtype where n is large.
    probabilities = logits.softmax(-1)  # of a wider dtype than the logits, under autocast
    return Route(probabilities, chosen, torch.zeros_like(probabilities).scatter(-1, chosen, largest.softmax(-1)))


def imbalance(found: Route) -> Tensor:
    """The balance loss of mixtures of experts: k where all are chosen equally often and equally surely, up to n k at worst.

        n sum_i f_i P_i,    f_i the share of tokens that chose i (their sum is k), P_i the mean probability of i

    Its gradient goes through P alone. Zero for no tokens.
    """
    n = found.probabilities.shape[-1]
    tokens = max(1, found.probabilities.numel() // n)
    often = torch.bincount(found.chosen.flatten(), minlength=n).to(found.probabilities.dtype) / tokens
    return n * (often * found.probabilities.reshape(-1, n).sum(0) / tokens).sum()


def beside(y: Tensor, loss: Tensor, weight: float) -> Tensor:
    """`y`, in whose backward pass `weight * loss` is differentiated too, as if it had been added to the model's loss.

    So every training loop has it. It is added once in each backward pass through `y`, whatever the model's loss is multiplied
    by there: of a loss scaled for float16, or divided over steps that accumulate, it is not scaled or divided with.
    """
    return _Beside.apply(y, loss, weight) if weight and loss.requires_grad else y


class _Beside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor, weight: float) -> Tensor:
        ctx.weight, ctx.like = weight, (loss.shape, loss.dtype, loss.device)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        shape, dtype, device = ctx.like
        return gradients[0], torch.full(shape, ctx.weight, dtype=dtype, device=device), None
