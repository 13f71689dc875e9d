"""DiffoRA: LoRA beside the layers that a search found to deserve it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import nn

from poise.catalog import Paper, choice, method

from ..adaptation import Draw, Losses
from ..adapter import LowRank
from ..relaxing import Relaxation, largest, row_and_kind, search
from ..targets import Place
from .lora import LoRA, start


@method(
    "diffora",
    family="adapt",
    kind="adapter",
    paper=Paper(
        "Enabling Parameter-Efficient LLM Fine-Tuning via Differential Low-Rank Matrix Adaptation",
        arxiv="2502.08905",
        year=2025,
    ),
    tune={"alpha": choice(8.0, 16.0, 32.0), "keep": choice(0.25, 0.5, 0.75)},
    mutant=("if place.path in chosen", "if place.path not in chosen"),
)
@dataclass(frozen=True)
class DiffoRA(LoRA):
    """Experimental: LoRA beside the layers that a search found to deserve it; others share a pair for each kind, or have none.

        1. beside every layer   y = W x + D s B A x,    D = sigmoid(Theta), at first 1/2
        2. in turn              a step of B and A on a batch,  a step of Theta on a held-out batch        (poise.adapt.relaxing)
        3. keep                 the layers with the largest D, of each block or of the whole model
        4. begin anew           y = W x + s B A x beside those; layers of one kind that were not kept share one B and A

        attach(model, DiffoRA(keep=0.5), losses=[lambda: loss of a batch, ...])
        attach(model, DiffoRA(selected=("model.layers.0.mlp.up_proj", ...)))

    The losses are of batches, of which every second one is held out of the training of B and A; the search takes
    2 `steps` forward and backward passes, which `Attached.passes` counts, and leaves the model as it was. A block is what
    stands below the first number of a path (`model.layers.0`), and layers of one kind have the same path but for that number,
    and weights of the same shape.

    Args:
        rank, alpha, dropout, rank_stabilized: as of LoRA.
        keep: 0.5, the fraction of layers that is kept; rounded, and at least one.
        within: "block": of each block, or of the model if no block has two of the layers. "model": of all layers together.
        share: whether the layers that were not kept share pairs; on. Off: nothing stands beside them.
        relaxation: "sigmoid"; "softmax": D is the softmax of Theta over the layers of a block.
        steps: 100, of the search.
        search_lr, share_lr: 1e-3 and 0.03, of B and A and of Theta in the search, with Adam.
        selected: the layers that are kept, by path, in place of a search; a file says which they are.

    Raises:
        ValueError: settings out of range; no losses, or one, and no `selected`; a path that is not among the targets.

    Where layers share pairs, `export` writes poise's own folder, else one that peft reads, with the kept layers alone.

    Reconstructed: abstract and summaries give the matrix of layers, its continuous relaxation, its discretisation with weight
    sharing. Chosen here, because no equation could be found: the sigmoid, DARTS of first order with its Adam, the largest of
    each block, and what is shared. Source: "Enabling Parameter-Efficient LLM Fine-Tuning via Differential Low-Rank Matrix
    Adaptation" (arXiv 2502.08905), whose second version speaks of Differential Module Selection.
    """

    peft: ClassVar[bool] = True
    reads_losses: ClassVar[bool] = True  # where no layers are named

    keep: float = 0.5
    within: Literal["block", "model"] = "block"
    share: bool = True
    relaxation: Relaxation = "sigmoid"
    steps: int = 100
    search_lr: float = 1e-3
    share_lr: float = 0.03
    selected: Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep={self.keep}: must be above 0 and at most 1")
        if self.within not in ("block", "model"):
            raise ValueError(f"within={self.within!r}: must be 'block' or 'model'")
        if self.relaxation not in ("sigmoid", "softmax"):
            raise ValueError(f"relaxation={self.relaxation!r}: must be 'sigmoid' or 'softmax'")
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps={self.steps}: must be a whole number of at least 1")
        for name in ("search_lr", "share_lr"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name}={value}: must be above 0 and finite")
        if self.selected is not None:
            if isinstance(self.selected, str) or not self.selected:
                raise ValueError(f"selected={self.selected!r}: must be paths of layers, at least one")
            object.__setattr__(self, "selected", tuple(self.selected))

    def settle(self, model: nn.Module, places: Sequence[Place], seed: int, losses: Losses) -> DiffoRA:
        if self.selected is not None:
            unknown = [path for path in self.selected if path not in {place.path for place in places}]
            if unknown:
                raise ValueError(f"selected: {unknown[0]!r} is not among the targets")
            return self
        shares = search(
            model,
            places,
            self._pair,
            losses,
            steps=self.steps,
            lr=self.search_lr,
            share_lr=self.share_lr,
            relaxation=self.relaxation,
            seed=seed,
        )
        return replace(self, selected=largest(shares, self.keep, self.within == "block"))

    def choose(self, model: nn.Module, places: Sequence[Place]) -> Sequence[Place]:
        return places if self.share else [place for place in places if place.path in (self.selected or ())]

    def begin(self, model: nn.Module, places: Sequence[Place], draw: Draw, losses: Losses) -> dict[Any, LowRank]:
        return {}  # what layers share, by their kind and layout

    def adapter(self, place: Place, draw: Draw, shared: Any) -> LowRank:
        chosen = self.selected or ()
        if place.path in chosen:
            return LowRank(*self._pair(place, draw))
        kind = row_and_kind(place.path)[1], place.layout, place.layer.weight.device, draw.dtype
        return shared.get(kind) or shared.setdefault(kind, LowRank(*self._pair(place, draw)))

    def _pair(self, place: Place, draw: Draw) -> tuple[Any, ...]:
        return place.layout, *start(place, draw, self.rank), self.scale, self.dropout
