"""Linear: the weighted mean of models."""

from __future__ import annotations

from torch import Tensor

from poise.catalog import Paper, method

from ..protocol import Each
from ..task_vectors import combined, each, normalized


@method(
    "linear",
    family="merge",
    kind="merge",
    paper=Paper("Model soups", arxiv="2203.05482", year=2022),
    mutant=('weights = normalized(weights, "linear")', "weights = [w / len(weights) for w in weights]"),
)
def linear(tensors: list[Tensor], base: Tensor | None = None, *, weight: Each[float] = 1.0, normalize: bool = True) -> Tensor:
    """The weighted mean of the models' weights, a uniform soup by default.

        theta = sum_i w_i theta_i / sum_i w_i

    Args:
        base: not used.
        weight: w, 1. A model of weight 0 is not looked at.
        normalize: divide by the sum of weights; without, the sum itself.

    Raises:
        ValueError: weights that sum to 0 are to be normalized.

    Summed in float64 and rounded once. What is not finite is so in the result too. Source: "Model soups" (arXiv 2203.05482).
    """
    weights = list(each(weight, len(tensors), "weight"))
    if normalize:
        weights = normalized(weights, "linear")
    return combined(tensors, weights)
