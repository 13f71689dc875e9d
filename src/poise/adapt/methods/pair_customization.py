"""Pair Customization: a LoRA of content and one of style, in orthogonal subspaces, so that the style can be used alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from poise.catalog import Paper, choice, method

from ..adaptation import Adaptation, Draw, Losses
from ..adapter import Adapter, Base, LowRank, added
from ..ends import attention_layers
from ..layout import Layout
from ..targets import Place, Targets

Bases = dict[tuple[int, torch.device, torch.dtype], tuple[nn.Parameter, nn.Parameter]]


class Part(LowRank):
    """A LoRA whose A is given, stays as it is, and may be held by other layers as well."""

    def __init__(self, layout: Layout, down: nn.Parameter, up: Tensor) -> None:
        super().__init__(layout, down, up, 1.0)
        self.lora_A = down


class ContentAndStyle(Adapter):
    """Two LoRAs beside one layer, each of which acts if it is active."""

    def __init__(self, layout: Layout, content: Part, style: Part) -> None:
        super().__init__(layout)
        self.content, self.style = content, style

    def parts(self) -> dict[str, LowRank]:
        return {"content": self.content, "style": self.style}

    def forward(self, x: Tensor, layer: Any, base: Base) -> Tensor:
        y = base(x)
        beside = [part.beside(x, layer) for part in self.parts().values() if part.active]
        return added(y, sum(beside[1:], beside[0])) if beside else y

    def folded(self, matrix: Tensor) -> Tensor:
        for part in self.parts().values():
            matrix = part.folded(matrix) if part.active else matrix
        return matrix


@method(
    "pair-customization",
    family="adapt",
    kind="adapter",
    paper=Paper("Customizing Text-to-Image Models with a Single Image Pair", arxiv="2405.01536", year=2024),
    tune={"style_rank": choice(4, 16, 64)},
    mutant=("basis[self.content_rank :]", "basis[: self.style_rank]"),
)
@dataclass(frozen=True)
class PairCustomization(Adaptation):
    """Two LoRAs, "content" and "style", that read orthogonal subspaces of the input, so that the style can be used alone.

        y = W x + b + B_content A_content x + B_style A_style x
        A_content, A_style: orthonormal rows, A_content A_style^T = 0, one draw for each input width; never trained
        B_content = B_style = 0 at first, and are all that trains

    Whatever the two B are, the changes <B_content A_content, B_style A_style> = 0. Trained on a pair of images, one of the
    content and one of the same in a style, in turn:

        attach(model, PairCustomization())
        with acting(model, "content"):                              # the image of the content, its prompt
            loss(model, content).backward()
        with acting(model, "content", "style", train="style"):      # from a third of the steps on: the styled image, its prompt
            loss(model, styled).backward()
        ...
        with acting(model, "style"):                                # and see style_guidance
            model(x)
        export(model, "style", part="style")                        # a LoRA for peft; the content's is dropped

    The optimizer steps after each of the two. `fold` folds the parts that act when it is called.

    Args:
        content_rank, style_rank: rows of each A, 64. Together at most the width of a layer's input.

    Raises:
        ValueError: settings out of range; a layer too narrow; no attention in a repeated block, where no targets are named.

    Without targets it stands beside all linear layers of attention. The authors take 750 steps with a learning rate of 1e-5,
    the style from step 250 on, and four batches of one image a step. Source: "Customizing Text-to-Image Models with a Single
    Image Pair" (arXiv 2405.01536), whose A are rows of a square orthogonal matrix; columns of a thin one, as here, are drawn
    alike, and cheaper.
    """

    content_rank: int = 64
    style_rank: int = 64

    def __post_init__(self) -> None:
        for name in ("content_rank", "style_rank"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be a whole number of at least 1")

    def default_targets(self, model: nn.Module) -> Targets:
        found = set(attention_layers(model))
        if not found:
            raise ValueError("targets: the model has no attention in a repeated block that is found; name the layers")
        return lambda path, _: path in found

    def begin(self, model: nn.Module, places: Sequence[Place], draw: Draw, losses: Losses) -> Bases:
        found: Bases = {}
        ranks = self.content_rank + self.style_rank
        for place in places:
            inputs, weight = place.layout.inputs, place.layer.weight
            if ranks > inputs:
                raise ValueError(
                    f"content_rank={self.content_rank}, style_rank={self.style_rank}: {place.path!r} has {inputs} inputs, "
                    "where so many directions cannot be orthogonal; choose less, or leave the layer out"
                )
            own = Draw(draw.generator.initial_seed(), f"inputs {inputs}", weight)
            key = (inputs, own.device, own.dtype)
            if key not in found:
                basis = torch.linalg.qr(own.normal(inputs, ranks).double()).Q.mT.to(own.dtype)
                halves = basis[: self.content_rank], basis[self.content_rank :]
                content, style = (nn.Parameter(half.clone(), requires_grad=False) for half in halves)
                found[key] = content, style
        return found

    def adapter(self, place: Place, draw: Draw, shared: Any) -> ContentAndStyle:
        layout = place.layout
        parts = (Part(layout, A, draw.zeros(layout.outputs, len(A))) for A in shared[layout.inputs, draw.device, draw.dtype])
        return ContentAndStyle(layout, *parts)


def style_guidance(
    unconditional: Tensor,
    conditional: Tensor,
    styled: Tensor | Sequence[Tensor] = (),
    guidance: float = 5.0,
    strength: float | Sequence[float] = 3.0,
) -> Tensor:
    """The noise that a diffusion model is taken to predict: guided by its prompt as the base is, and towards styles.

        e = e_u + g (e_c - e_u) + sum_k lambda_k (e_k - e_c)

    Args:
        unconditional, conditional: e_u and e_c, of the base: within `disabled(model)`, or `acting(model)` without parts.
        styled: e_k, with the LoRA of style k and the prompt that names it; one, or several. None of them in time steps that a
            style should not touch yet.
        guidance: g, 5.
        strength: lambda_k, 3, one for all or one each. 0: the base's guidance, exactly.

    Raises:
        ValueError: predictions of several shapes; other numbers of strengths and styles.
    """
    several = [styled] if isinstance(styled, Tensor) else list(styled)
    strengths = [strength] * len(several) if isinstance(strength, int | float) else list(strength)
    if len(several) != len(strengths):
        raise ValueError(f"strength: {len(strengths)} are given for {len(several)} styles")
    for name, one in [("conditional", conditional), *(("styled", one) for one in several)]:
        if one.shape != unconditional.shape:
            raise ValueError(f"{name}: is {list(one.shape)}, and unconditional {list(unconditional.shape)}; they must be alike")
    guided = unconditional + guidance * (conditional - unconditional)
    for one, much in zip(several, strengths, strict=True):
        if much:
            guided = guided + much * (one - conditional)
    return guided
