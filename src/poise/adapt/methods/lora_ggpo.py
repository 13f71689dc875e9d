"""LoRA-GGPO: LoRA trained under noise in the weights, larger where weights and gradients are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from poise.catalog import Paper, log_uniform, method
from poise.linalg.lengths import wide

from ..adaptation import Draw
from ..adapter import Base, LowRank, added
from ..layout import Layout
from ..targets import Place
from .lora import LoRA, start

Form = Literal["paper", "port"]
SAMPLE = 1000  # rows of which the port form takes the mean length


class _Watched(torch.autograd.Function):
    """A and B as they are; their gradients are shown to the adapter on the way back."""

    @staticmethod
    def forward(ctx: Any, down: Tensor, up: Tensor, adapter: Any) -> tuple[Tensor, Tensor]:
        ctx.adapter = adapter
        ctx.save_for_backward(down, up)
        return down.view_as(down), up.view_as(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        ctx.adapter.refresh(*ctx.saved_tensors, *grads)
        return grads[0], grads[1], None


class Perturbed(LowRank):
    """A low-rank change of a weight that is noisy in training.

    Attributes:
        gamma: by output, the row's length of the gradient of the weight that those of A and B imply, of the last backward pass.
        count: backward passes so far, of which the noise is a function.
    """

    gamma: Tensor
    count: Tensor
    origin: Tensor

    def __init__(self, layout: Layout, down: Tensor, up: Tensor, method: LoRAGGPO, origin: Tensor, seed: int) -> None:
        super().__init__(layout, down, up, method.scale, method.dropout)
        self.method, self.seed = method, seed
        self.register_buffer("gamma", up.new_zeros(len(up)))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64, device=up.device))
        self.register_buffer("origin", origin)

    def forward(self, x: Tensor, layer: Any, base: Base) -> Tensor:
        y = added(base(x), self.beside(x, layer))
        count = int(self.count)
        if (
            not self.training
            or count == 0
            or (self.method.sigma == 0 and (self.method.form == "paper" or self.method.beta == 0))
        ):
            return y
        noise = self.spread(layer)[:, None] * self.normal(count)
        seen = x.to(noise.dtype) if x.is_floating_point() else x
        return added(y, self.layout.down(layer, seen if self.method.through else seen.detach(), noise))

    def beside(self, x: Tensor, layer: Any) -> Tensor:
        if not (self.training and torch.is_grad_enabled() and self.lora_A.requires_grad and self.lora_B.requires_grad):
            return super().beside(x, layer)
        if x.is_floating_point():
            x = self.dropout(x).to(self.lora_A.dtype)
        down, up = _Watched.apply(self.lora_A, self.lora_B, self)
        return self.layout.up(self.layout.down(layer, x, down), up) * self.scale

    @torch.no_grad()
    def refresh(self, down: Tensor, up: Tensor, down_grad: Tensor, up_grad: Tensor) -> None:
        """Take gamma from the gradients of A and B."""
        self.gamma.copy_((self.scale * (up @ down_grad + up_grad @ down)).norm(dim=1))
        self.count += 1

    @torch.no_grad()
    def spread(self, layer: Any) -> Tensor:
        """c: the standard deviation of the noise in each row."""
        how, (down, up, scale) = self.method, self.factors()
        if how.form == "port":
            lengths = (self.origin.square() + (scale * (up @ down)).square().sum(1)).sqrt()
            return len(up) ** -0.5 * (how.sigma * lengths + how.beta * self.gamma.square())
        squares = self.folded(self.layout.rows.view(wide(layer.weight))).square().sum(1).to(up.dtype)
        return how.sigma * ((squares + how.beta * self.gamma.square()) / down.shape[1]).sqrt()

    def normal(self, count: int) -> Tensor:
        """Z of a pass, the same when it is computed again."""
        return Draw(self.seed, str(count), self.lora_A).noise(self.layout.outputs, self.layout.inputs)


@method(
    "lora-ggpo",
    family="adapt",
    kind="adapter",
    paper=Paper(
        "Mitigating Double Descent in LoRA Fine-Tuning via Gradient-Guided Perturbation Optimization",
        arxiv="2502.14538",
        year=2025,
    ),
    tune={"sigma": log_uniform(3e-3, 0.3), "beta": log_uniform(1e-3, 1.0)},
    mutant=("up @ down_grad + up_grad @ down", "up @ down_grad"),
    exempt={"ddp": "The noise of each process follows the gradients of its own part of the batch."},
)
@dataclass(frozen=True)
class LoRAGGPO(LoRA):
    """LoRA whose weights are noisy in training, each row as much as its length and its gradient's say: experimental.

        y = W x + s B A x + E x,    E_j = c_j Z_j,    Z ~ N(0, 1) anew after each backward pass
        "paper":  c_j^2 = sigma^2 / d_in (|W'_j|^2 + beta gamma_j^2),    W' = W + s B A
        "port":   c_j   = d_out^(-1/2) (sigma sqrt(w^2 + |s (B A)_j|^2) + beta gamma_j^2),    w the mean length of W's rows
        gamma_j = |(s (B g_A + g_B A))_j|,    gradients of the last backward pass

    There is none before the first backward pass and in eval mode. It costs a Gaussian matrix and a product for each layer and
    pass, and no second backward pass. The same noise is drawn again under activation checkpointing.

    Args:
        rank, alpha, dropout, rank_stabilized: as of LoRA.
        sigma: 0.03: with beta = 0 the noise of a row is as long, in the mean square, as this share of the row.
        beta: weight of the gradient, 0.01.
        form: see above.
        through: whether gradients of layers below see E, as the loss L(W + E) has it; on. The port's do not.

    Raises:
        ValueError: settings out of range.

    The "paper" form is known from an implementation that cites its equations, not from the first version itself, whose code is
    not public; later versions are another method. The port leaves s out of |s (B A)_j| by an oversight, which is mended here.
    In several processes gamma is each one's own. Source: "Mitigating Double Descent in LoRA Fine-Tuning via Gradient-Guided
    Perturbation Optimization" (arXiv 2502.14538v1).
    """

    sigma: float = 0.03
    beta: float = 0.01
    form: Form = "paper"
    through: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("sigma", self.sigma), ("beta", self.beta)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}={value}: must be finite and not negative")
        if self.form not in ("paper", "port"):
            raise ValueError(f"form={self.form!r}: must be 'paper' or 'port'")

    def adapter(self, place: Place, draw: Draw, shared: Any) -> LowRank:
        down, up = start(place, draw, self.rank)
        rows = place.layout.rows.view(place.layer.weight.detach())
        if len(rows) > SAMPLE:
            rows = rows[torch.randperm(len(rows), generator=draw.generator)[:SAMPLE].to(rows.device)]
        origin = wide(rows).norm(dim=1).mean().to(draw.dtype)
        return Perturbed(place.layout, down, up, self, origin, draw.generator.initial_seed())
