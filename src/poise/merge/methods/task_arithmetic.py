"""Task arithmetic: what fine-tunings did, added up."""

from __future__ import annotations

from torch import Tensor

from poise.catalog import Paper, method, uniform

from ..protocol import Each
from ..task_vectors import combined, each, needed, normalized


@method(
    "task_arithmetic",
    family="merge",
    kind="merge",
    paper=Paper("Editing Models with Task Arithmetic", arxiv="2212.04089", year=2023),
    tune={"lambda_": uniform(0.0, 1.0)},
    mutant=("[lambda_ * w for w in weights], base)", "[lambda_ * w for w in weights])"),
)
def task_arithmetic(
    tensors: list[Tensor],
    base: Tensor | None = None,
    *,
    weight: Each[float] = 1.0,
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """The base, moved along the weighted sum of the models' task vectors.

        tau_i = theta_i - theta_0;   theta = theta_0 + lambda sum_i w_i tau_i

    Args:
        base: theta_0, from which every model was fine-tuned.
        weight: w, 1. Negative to forget a task.
        normalize: divide by the sum of weights; off.
        lambda_: 1, which is right for one task. For several the authors choose it on held-out data out of 0, 0.05, ..., 1; 0.3
            to 0.4 is a usual start.

    Raises:
        ValueError: no base; weights that sum to 0 are to be normalized.

    Summed in float64 and rounded once; lambda w = 1 of a single model gives it bit for bit. What is not finite is so in the
    result too. Source: "Editing Models with Task Arithmetic" (arXiv 2212.04089).
    """
    base = needed(base, "task_arithmetic")
    weights = list(each(weight, len(tensors), "weight"))
    if normalize:
        weights = normalized(weights, "task_arithmetic")
    return combined(tensors, [lambda_ * w for w in weights], base)
