"""LoRA-SB: a small matrix trains between frozen orthonormal ones, which the first full step of training chooses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from poise.catalog import Paper, log_uniform, method
from poise.linalg.truncated import singular_triplets

from ..adaptation import Adaptation, Draw, Losses
from ..adapter import LowRank
from ..estimates import summed_gradients
from ..layout import Layout
from ..targets import Place
from .lora import check

Decomposition = Literal["exact", "randomized"]


class Cored(LowRank):
    """A product of three matrices beside a weight, of which the small one in the middle trains.

        y = W x + s B R A x

    Args:
        layout, scale, dropout: as of LowRank.
        down, core, up: A (rank, inputs), R (rank, rank) and B (outputs, rank).
    """

    def __init__(self, layout: Layout, down: Tensor, core: Tensor, up: Tensor, scale: float, dropout: float = 0.0) -> None:
        super().__init__(layout, down, up, scale, dropout)
        self.lora_A.requires_grad_(False)
        self.lora_B.requires_grad_(False)
        self.lora_R = nn.Parameter(core)

    @property
    def core(self) -> nn.Parameter:
        return self.lora_R

    def between(self, h: Tensor) -> Tensor:
        return self.layout.up(h, self.lora_R)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """A, B R and s."""
        return self.lora_A, self.lora_B @ self.lora_R, self.scale

    def folded(self, matrix: Tensor) -> Tensor:
        core, up, down = (t.to(matrix.dtype) for t in (self.lora_R, self.lora_B, self.lora_A))
        return matrix + self.scale * (up @ core @ down)


@method(
    "lora-sb",
    family="adapt",
    kind="adapter",
    paper=Paper(
        "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning",
        arxiv="2411.19557",
        year=2024,
    ),
    tune={"first_lr": log_uniform(1e-6, 1e-3)},
    mutant=("torch.diag(s[:rank]) / self.scale", "torch.zeros_like(torch.diag(s[:rank]))"),
    exempt={
        "starts as the base": "It starts one step of sign descent ahead, as far as that has the rank: R is not zero at first.",
    },
)
@dataclass(frozen=True)
class LoRASB(Adaptation):
    """A trained r x r matrix between two frozen ones, which span what the first step of full training would change most.

        y = W x + b + s B R A dropout(x),    s = alpha / rank

    With the gradients G of each W summed over some batches, at the weights as they are,

        D = -first_lr sign(sum of G) ~ U S V^T, truncated to the rank;    A = V^T,    B = U,    R = S / s

    R alone trains. As A and B are orthonormal, a step of SGD on it changes W by -lr s^2 B B^T G A^T A, the projected gradient.
    W is not moved: the model starts about one step ahead of the base.

        attach(model, LoRASB(rank=64), losses=[lambda: loss of a batch, ...])

    Args:
        rank: 32; a layer narrower than that gets as many as it has.
        alpha: None: as the rank, so that s = 1, whatever a layer's rank.
        dropout: of the adapter's input, in training, 0.
        batches: at most so many losses are asked, 17: with batches of 3 about the 50 examples of the paper.
        first_lr: entries of D are of this size, 1e-5: the first learning rate of the warm-up, lr / (steps of warm-up), in the
            paper, 4e-6 of its runs on arithmetic.
        decomposition: "exact", or "randomized", of a sketch of rank + oversampling columns with 10 iterations: faster for wide
            layers, and not exact, because singular values of a matrix of signs barely differ.
        oversampling: 16.

    Raises:
        ValueError: settings out of range; a gradient that is not finite.

    Trains rank^2 numbers a layer. Without losses A and B are random and orthonormal, and R = 0. `export(form="peft")` writes A
    and B R as a LoRA, which goes on training as one. Under DDP, which hands on what the first process has, the gradients are
    those of its batches.

    Source: "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning" (arXiv
    2411.19557). Its release rounds A, B and R to bfloat16, which takes their orthonormality, and its sketch has no columns to
    spare; both are left out here. Its loss of a batch is divided by the batch's size again, so that a smaller last batch
    counts for more; here the losses are taken as they are given.
    """

    reads_losses: ClassVar[bool] = True
    needs_losses: ClassVar[bool] = True
    peft: ClassVar[bool | Literal["as LoRA"]] = "as LoRA"

    rank: int = 32
    alpha: float | None = None
    dropout: float = 0.0
    batches: int = 17
    first_lr: float = 1e-5
    decomposition: Decomposition = "exact"
    oversampling: int = 16

    def __post_init__(self) -> None:
        check(self.rank, self.alpha, self.dropout)
        if not isinstance(self.batches, int) or self.batches < 1:
            raise ValueError(f"batches={self.batches}: must be a whole number of at least 1")
        if not self.first_lr > 0:
            raise ValueError(f"first_lr={self.first_lr}: must be above 0")
        if self.decomposition not in get_args(Decomposition):
            raise ValueError(f"decomposition={self.decomposition!r}: must be 'exact' or 'randomized'")
        if not isinstance(self.oversampling, int) or self.oversampling < 0:
            raise ValueError(f"oversampling={self.oversampling}: must be a whole number of at least 0")

    @property
    def scale(self) -> float:
        """s."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def begin(self, model: nn.Module, places: Sequence[Place], draw: Draw, losses: Losses) -> dict[str, Tensor]:
        asked = list(islice(losses, self.batches))
        return summed_gradients(model, places, asked) if asked else {}

    def adapter(self, place: Place, draw: Draw, shared: dict[str, Tensor]) -> Cored:
        layout = place.layout
        rank = min(self.rank, layout.inputs, layout.outputs)
        if place.path not in shared:
            down, up = (torch.linalg.qr(draw.normal(size, rank))[0] for size in (layout.inputs, layout.outputs))
            return Cored(layout, _alone(down.mT), draw.zeros(rank, rank), _alone(up), self.scale, self.dropout)
        step = -self.first_lr * torch.sign(shared.pop(place.path))
        sketch = None
        if self.decomposition == "randomized":
            sketch = draw.normal(layout.inputs, min(rank + self.oversampling, layout.inputs, layout.outputs))
        U, s, Vh = singular_triplets(step, sketch, iterations=10)
        core = torch.diag(s[:rank]) / self.scale
        return Cored(layout, _alone(Vh[:rank]), core, _alone(U[:, :rank]), self.scale, self.dropout)


def _alone(t: Tensor) -> Tensor:
    """In memory of its own, row after row: what is read from a file lies so too, and gives the same bits."""
    return t.clone(memory_format=torch.contiguous_format)
