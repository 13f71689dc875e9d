"""Mean-only batch normalization: weight normalization's companion, which divides by nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from poise.catalog import Paper, log_uniform, method
from poise.linalg.lengths import wide


@method(
    "mean-only-batch-norm",
    family="training",
    kind="module",
    paper=Paper(
        "Weight Normalization: A Simple Reparameterization to Accelerate Training of Deep Neural Networks",
        arxiv="1602.07868",
        year=2016,
    ),
    tune={"momentum": log_uniform(1e-3, 0.5)},
    mutant=("mean = wide(t).mean(others)", "mean = wide(t.detach()).mean(others)"),
)
class MeanOnlyBatchNorm(nn.Module):
    """Subtracts the mean of the batch and adds a bias; the variance is left to weight normalization.

        y = t - mean[t] + b                        mean over the batch and all positions, one for each feature
        running_mean <- (1 - momentum) running_mean + momentum mean[t]

    In training the gradient flows through the mean, so that gradients are centred too; in evaluation the running mean stands in
    for it. Put it after a layer without a bias of its own.

    Args:
        num_features: the size of t along `dim`.
        momentum: 0.1, as in torch's batch norms and the authors' code.
        dim: where the features stand, 1 as in torch's batch norms; -1 for (batch, positions, features).
        bias: whether b is learned.

    Raises:
        ValueError: t has another number of features.

    Source: "Weight Normalization: A Simple Reparameterization to Accelerate Training of Deep Neural Networks" (arXiv
    1602.07868), section 4.
    """

    running_mean: Tensor

    def __init__(self, num_features: int, momentum: float = 0.1, dim: int = 1, bias: bool = True) -> None:
        super().__init__()
        if not 0.0 < momentum <= 1.0:
            raise ValueError(f"momentum={momentum}: must be in (0, 1]")
        self.num_features, self.momentum, self.dim = num_features, momentum, dim
        self.bias = nn.Parameter(torch.zeros(num_features)) if bias else None
        self.register_buffer("running_mean", torch.zeros(num_features))

    def forward(self, t: Tensor) -> Tensor:
        if t.shape[self.dim] != self.num_features:
            raise ValueError(
                f"t {tuple(t.shape)} has {t.shape[self.dim]} features in dimension {self.dim}, not {self.num_features}"
            )
        place = self.dim % t.ndim
        others = [dim for dim in range(t.ndim) if dim != place]
        if self.training:
            mean = wide(t).mean(others)
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        else:
            mean = wide(self.running_mean)
        shift = -mean if self.bias is None else wide(self.bias) - mean
        return (wide(t) + shift.reshape(-1, *(1 for _ in range(place + 1, t.ndim)))).to(t.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_features}, momentum={self.momentum}, dim={self.dim}, bias={self.bias is not None}"
