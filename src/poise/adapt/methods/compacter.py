"""Compacter: bottleneck adapters whose matrices are sums of Kronecker products of shared small and rank-one parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poise.catalog import Paper, choice, method

from ..adaptation import Adaptation, Draw, Losses
from ..adapter import Adapter, Base, added
from ..ends import module_ends
from ..layout import Layout
from ..targets import Place, Targets, norms


class Mixing(nn.Module):
    """The n small matrices A_i (n, n, n) that every map of a model shares: one module, held by all of them."""

    def __init__(self, A: Tensor) -> None:
        super().__init__()
        self.A = nn.Parameter(A)


class PHMLinear(nn.Module):
    """A linear map whose matrix is a sum of Kronecker products, evaluated without making it.

        y = x H + b,    H = sum_i A_i (x) s_i t_i    (inputs, outputs)

    With x as a matrix X (n, inputs / n), x H is sum_i A_i^T X s_i t_i, read in the same order: r n (inputs + outputs + n^2)
    products, where H itself has inputs outputs entries.

    Args:
        mixing: A, shared with other maps.
        s: (n, inputs / n, r).
        t: (n, r, outputs / n).
        b: (outputs,).
    """

    def __init__(self, mixing: Mixing, s: Tensor, t: Tensor, b: Tensor) -> None:
        super().__init__()
        self.mixing = mixing
        self.s, self.t, self.b = nn.Parameter(s), nn.Parameter(t), nn.Parameter(b)

    def forward(self, x: Tensor) -> Tensor:
        n, _, r = self.s.shape
        h = x.unflatten(-1, (n, -1)) @ self.s.transpose(0, 1).flatten(1)  # (..., a, i r)
        h = torch.einsum("...air,iac->...cir", h.unflatten(-1, (n, r)), self.mixing.A.to(x.device))
        return (h.flatten(-2) @ self.t.flatten(0, 1)).flatten(-2) + self.b

    def matrix(self) -> Tensor:
        """H."""
        return torch.stack([torch.kron(A, s @ t) for A, s, t in zip(self.mixing.A, self.s, self.t, strict=True)]).sum(0)

    def extra_repr(self) -> str:
        n, rows, r = self.s.shape
        return f"{n * rows}, {len(self.b)}, n={n}, rank={r}"


class Bottleneck(Adapter):
    """What stands after a layer: its output, and a narrow network of it added."""

    foldable = False

    def __init__(self, layout: Layout, down: PHMLinear, up: PHMLinear) -> None:
        super().__init__(layout)
        self.down, self.up = down, up

    def forward(self, x: Tensor, layer: Any, base: Base) -> Tensor:
        y = base(x)
        features = torch.movedim(y, self.layout.axis, -1).to(self.down.s.dtype)
        beside = self.up(F.gelu(self.down(features), approximate="tanh"))
        return added(y, torch.movedim(beside, -1, self.layout.axis))


@method(
    "compacter",
    family="adapt",
    kind="adapter",
    paper=Paper("Efficient Low-Rank Hypercomplex Adapter Layers", arxiv="2106.04647", year=2021),
    tune={"reduction": choice(8, 16, 32), "plus": choice(False, True)},
    mutant=('"...air,iac->...cir"', '"...air,ica->...cir"'),
    exempt={
        "starts as the base": "A is drawn small and not zero, from where nothing but a bias would ever train; the model "
        "starts as the base up to a relative 1e-3.",
        "folds": "The adapter is a network with a nonlinearity after the layer, so no weight does the same.",
        "fsdp bfloat16": "Its norms train in the dtype they have, and FSDP2 takes trained parameters of one dtype only.",
    },
)
@dataclass(frozen=True)
class Compacter(Adaptation):
    """Narrow networks after attention and feed-forward modules, whose matrices share their small factors over all layers.

        y <- y + Up(gelu(Down(y))),    Down from k features to k / reduction, Up back,    gelu by its tanh formula
        each of them  x H + b,    H = sum_{i=1..n} A_i (x) s_i t_i,    (x) the Kronecker product
        A_i (n, n) ~ N(0, spread^2), shared by all maps of the model;  b = 0
        s_i (inputs / n, rank), t_i (rank, outputs / n), uniform in Glorot's range times sqrt(2)

    They stand after self-attention and after the feed-forward part of every repeated block, before the residual addition: that
    is after the last layer of either: `o_proj` and `down_proj` of Llama, `c_proj` of GPT-2, `output.dense` of BERT. Any other
    layers can be named as `targets`. Norms of the model train, too. Per model n^3 parameters, and per map
    rank (inputs + outputs) + outputs.

        attach(model, Compacter(plus=True))

    Args:
        plus: Compacter++: after the feed-forward part alone. Off.
        n: matrices, and the size of each, 4. It divides k and k / reduction.
        reduction: 32.
        rank: of s_i t_i, 1.
        spread: standard deviation of A's entries, 1e-4: the model starts as the base up to about that.
        norms: whether the model's norms train, on.

    Raises:
        ValueError: settings out of range; a width of which n is no divisor, before or after reduction; no such blocks.

    The authors train with a learning rate of 3e-3. Where T5 drops part of a module's output, it does so after their adapter,
    and after this one. Source: "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers" (arXiv 2106.04647).
    """

    plus: bool = False
    n: int = 4
    reduction: int = 32
    rank: int = 1
    spread: float = 1e-4
    norms: bool = True

    def __post_init__(self) -> None:
        for name in ("n", "reduction", "rank"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be a whole number of at least 1")
        if not self.spread > 0:
            raise ValueError(f"spread={self.spread}: must be above 0")

    def default_targets(self, model: nn.Module) -> Targets:
        attention, forward = module_ends(model)
        found = {*forward, *(() if self.plus else attention)}
        if not forward:
            raise ValueError("targets: the model has no feed-forward part of a repeated block that is found; name the layers")
        return lambda path, _: path in found

    def also(self, model: nn.Module) -> Sequence[str]:
        return norms(model) if self.norms else ()

    def begin(self, model: nn.Module, places: Sequence[Place], draw: Draw, losses: Losses) -> Mixing:
        return Mixing(draw.normal(self.n, self.n, self.n, std=self.spread))

    def adapter(self, place: Place, draw: Draw, shared: Any) -> Bottleneck:
        width = place.layout.outputs
        narrow = width // self.reduction
        if width % self.n or narrow % self.n or not narrow:
            raise ValueError(
                f"n={self.n}, reduction={self.reduction}: the {width} outputs of {place.path!r} and the {narrow} features that "
                f"are left of them must be multiples of n; choose others, or leave the layer out"
            )
        return Bottleneck(place.layout, self._map(width, narrow, draw, shared), self._map(narrow, width, draw, shared))

    def _map(self, inputs: int, outputs: int, draw: Draw, mixing: Mixing) -> PHMLinear:
        rows, columns = inputs // self.n, outputs // self.n
        s = draw.uniform(self.n, rows, self.rank, bound=math.sqrt(2 * 6 / (rows + self.rank)))
        t = draw.uniform(self.n, self.rank, columns, bound=math.sqrt(2 * 6 / (self.rank + columns)))
        return PHMLinear(mixing, s, t, draw.zeros(outputs))
