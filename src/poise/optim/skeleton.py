"""What every optimizer for matrices shares: its rule on hidden matrices, AdamW on all that is left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .options import check_rate
from .routing import Route, everything, hidden_matrices
from .transform import Transform
from .transforms.adaptive import adam


@dataclass(frozen=True)
class AdamWRest:
    """AdamW for embeddings, output heads, norms, biases and vectors, in groups of their own.

    Raises:
        ValueError: for a learning rate or decay that is negative.
    """

    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    eps_at: Literal["corrected", "uncorrected"] = "corrected"

    def __post_init__(self) -> None:
        check_rate("adamw_lr", self.lr)
        check_rate("adamw_weight_decay", self.weight_decay)

    @classmethod
    def following(
        cls,
        lr: float | Tensor,
        weight_decay: float,
        adamw_lr: float | Tensor | None,
        betas: tuple[float, float],
        eps: float,
        adamw_weight_decay: float | None,
        eps_at: Literal["corrected", "uncorrected"] = "corrected",
    ) -> AdamWRest:
        """With the matrices' own `lr` and `weight_decay` where it is given None."""
        return cls(
            lr if adamw_lr is None else adamw_lr,
            betas,
            eps,
            weight_decay if adamw_weight_decay is None else adamw_weight_decay,
            eps_at,
        )

    def beside(self, name: str, rule: Transform, lr: float | Tensor, weight_decay: float) -> list[Route]:
        """Routes of `rule`, called `name`, for hidden matrices and of AdamW for the rest."""
        rest = adam(self.betas, self.eps, eps_at=self.eps_at)
        return [
            Route(name, rule, hidden_matrices, {"lr": lr, "weight_decay": weight_decay}),
            Route("adamw", rest, everything, {"lr": self.lr, "weight_decay": self.weight_decay}),
        ]
