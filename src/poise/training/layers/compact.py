"""CompAct: linear layers that keep a random projection of their input for the backward pass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from poise.catalog import Paper, choice, log_uniform, method
from poise.linalg.lengths import wide
from poise.linalg.projectors import Projector
from poise.memory.rounding import key_of
from poise.modules import Layers, become, linears, put_first

from .. import weights
from ._following import Following

M = TypeVar("M", bound=nn.Module)
NAMES = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class Sketch:
    """A random matrix P (features, rank) that is drawn anew whenever it is needed, and another one after `gap` steps."""

    features: int
    rank: int
    gap: int | None
    scale: float
    seed: int
    steps: int = 0

    def matrix(self, like: Tensor) -> Tensor:
        """P with independent entries N(0, 1 / rank), on the device of `like`, in float32 or, for float64, in that."""
        seed = self.seed + (self.steps // self.gap if self.gap else 0)
        generator = torch.Generator(like.device).manual_seed(seed)
        dtype = weights.computing(like.dtype)
        normal = torch.randn(self.features, self.rank, generator=generator, device=like.device, dtype=dtype)
        return normal / math.sqrt(self.rank)


@method(
    "compact",
    family="training",
    kind="layer",
    paper=Paper("CompAct: Compressed Activations for Memory-Efficient LLM Training", arxiv="2410.15352", year=2024),
    tune={"rank": choice(0.125, 0.25, 0.5), "scale": log_uniform(0.05, 4.0)},
    mutant=("normal / math.sqrt(self.rank)", "normal"),
)
class CompAct(nn.Linear):
    """A linear layer that keeps `x P` for the backward pass instead of x; optimizer state is that small too.

    With P (in, r), entries N(0, 1/r), drawn from a seed whenever it is needed and never kept:

        y   = x W^T + b                         as nn.Linear, bit for bit; kept: z = x P, (tokens, r)
        dx  = dy W,   db = sum dy               as nn.Linear, bit for bit
        G_c = dy^T z                            (out, r), the gradient that the optimizer gets; E[G_c P^T] is the weight's
        W  <- (1 - lr weight_decay) W + scale D P^T,    D the displacement that the optimizer makes of G_c

    The optimizer's parameter is `compressed`, the displacement D: zero, except within a step. So any optimizer will do, in any
    state format; gradients are clipped, scaled, accumulated and averaged over ranks at out * r values. Every `gap` steps the
    seed moves on, and what the optimizer remembers is kept as it is. At any time the layer is the one of the matrix
    `W + scale compressed P^T`: drivers that move parameters for a while (`SAM`) see what they should.

        CompAct.attach(model, rank=0.25)
        opt = AdamW(model, lr=3e-3, eps=1e-6, weight_decay=0.0)   # made after it
        CompAct.follow(opt, model)                                # W takes D in after every step
        ...
        CompAct.detach(model)                                     # plain nn.Linear again

    `E ||G_c P^T - G||^2 = (in + 1) / r ||G||^2`: the update is mostly noise, which `scale` holds down.

    Args:
        rank: r: a share of `in`, or a whole number. 0.25; the authors take 0.25 to 0.5 to pre-train, 8 to fine-tune.
        gap: steps until P changes: 200; 50 for their smallest model, 500 to fine-tune. None: it never does.
        scale: 0.25; 2 to fine-tune at rank 8.
        seed: of P. `attach` gives every layer its own, by its path.

    Raises:
        ValueError: for a rank, gap or scale that cannot be.

    Memory: autograd keeps r values a token for `in` (`kept_bytes` counts it), but layers that read the same input, as q, k and
    v, no longer share what they keep. Gradient, `compressed` and each moment are out * r. W is a buffer: to FSDP it is not
    sharded, and DistributedDataParallel wants broadcast_buffers=False. bfloat16 weights take D in by stochastic rounding.

    The authors' Adam adds eps before bias correction and decays after the step:
    `Optimizer(model, chain(adam(betas, 1e-6, correct_bias=False), debias(betas)), lr, weight_decay, decay="after")`.
    Source: "CompAct: Compressed Activations for Memory-Efficient LLM Training" (arXiv 2410.15352) and its code, whose update of
    one layer at a time during the backward pass is left out.
    """

    sketch: Sketch
    compressed: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int | float = 0.25,
        gap: int | None = 200,
        scale: float = 0.25,
        seed: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check(rank, gap, scale)
        super().__init__(in_features, out_features, bias, device, dtype)
        self._compress(rank, gap, scale, seed)

    @classmethod
    def attach(
        cls,
        model: M,
        layers: Layers | None = None,
        *,
        rank: int | float = 0.25,
        gap: int | None = 200,
        scale: float = 0.25,
        seed: int = 0,
    ) -> M:
        """Make linear layers of `model` such ones, in place; returns `model`. Do it before you make the optimizer.

        Args:
            model: a module; it may be such a layer itself.
            layers: a glob of paths, or a function of path and layer. None for those of Llama but the attention's output, whose
                input attention keeps anyway: q_proj, k_proj, v_proj, gate_proj, up_proj, down_proj. Leave out embeddings, norms
                and head. Frozen layers, which keep no input, are passed over.
            rank, gap, scale, seed: see the class.

        Raises:
            TypeError, ValueError: no such layer, one that is not plain, a weight shared with another layer. Nothing has been
                changed then.
        """
        _check(rank, gap, scale)
        found = linears(model, layers, lambda path, _: path.rpartition(".")[2] in NAMES)
        found = [(path, layer) for path, layer in found if layer.weight.requires_grad]
        if not found:
            raise ValueError("layers: all of them are frozen (requires_grad=False)")
        owners = [id(p) for module in model.modules() for p in module._parameters.values() if p is not None]
        for path, layer in found:
            if owners.count(id(layer.weight)) > 1:
                raise ValueError(f"layers: the weight of {path!r} is shared with another layer; leave it out")
        for path, layer in found:
            become(layer, cls)._compress(rank, gap, scale, key_of(seed, path))
        return model

    @staticmethod
    def follow(
        optimizer: torch.optim.Optimizer, model: nn.Module, *, outputs: Layers | None = None, output_scale: float = 0.125
    ) -> Following:
        """After every step of `optimizer`, let the weights of the model's `CompAct` layers take in what it did.

        Args:
            optimizer: made after `attach`; around drivers, the innermost one is followed.
            model: whose layers are meant.
            outputs: uncompressed linear layers whose updates are made smaller too, as the authors do with the attention's
                output. None: those called o_proj, if there are any.
            output_scale: the factor of their updates, decay apart: 0.125, which is the authors' 0.5 times a `scale` of 0.25.

        Returns:
            A handle; `handle.remove()` ends it. Without it the layers go on as `W + scale compressed P^T`.

        Raises:
            ValueError: there is no such layer, the optimizer lacks one, or its weight decay is not a decoupled one that could
                act on W: those of poise's optimizers (but "l2") and torch's AdamW are.
        """
        layers = [layer for layer in model.modules() if isinstance(layer, CompAct)]
        if not layers:
            raise ValueError("model: it has no CompAct layer; call CompAct.attach first, and make the optimizer after it")
        if outputs is None:
            chosen = [one for path, one in model.named_modules() if path.rpartition(".")[2] == "o_proj"]
            scaled = [one.weight for one in chosen if type(one) is nn.Linear]
        else:
            scaled = [layer.weight for _, layer in linears(model, outputs, lambda *_: False)]
        return Following(optimizer, layers, scaled, output_scale)

    @staticmethod
    def detach(model: M) -> M:
        """Make plain nn.Linear of the model's `CompAct` layers, in place; returns `model`. Outputs stay bit for bit.

        Weights become parameters again, new ones: an optimizer made before does not know them.
        """
        for layer in model.modules():
            if isinstance(layer, CompAct):
                with torch.no_grad():
                    weight = layer.effective_weight()
                trained = layer.compressed.requires_grad
                del layer.compressed, layer.weight, layer.sketch, layer._zero_at, layer._followed
                put_first(layer, "weight", nn.Parameter(weight, trained))
                become(layer, nn.Linear)
        return model

    def effective_weight(self) -> Tensor:
        """`W + scale compressed P^T`; between steps, W itself."""
        if self.compressed._version == self._zero_at:
            return self.weight
        moved = wide(self.compressed.detach()) @ self.sketch.matrix(self.weight).mT
        return (wide(self.weight) + self.sketch.scale * moved).to(self.weight.dtype)

    def forward(self, input: Tensor) -> Tensor:
        weight = self.effective_weight()
        if not (torch.is_grad_enabled() and self.compressed.requires_grad):
            return linear(input, weight, self.bias)
        result: Any = _Compressed.apply(input, weight, self.bias, self.compressed, self)
        return result

    @torch.no_grad()
    def take_in(self, optimizer: torch.optim.Optimizer, shrink: float = 0.0) -> None:
        """`W <- (1 - shrink) W + scale compressed P^T`, `compressed <- 0`."""
        moved, weight = weights.read(optimizer, self.compressed), weights.read(optimizer, self.weight)
        weight = weight * (1 - shrink) + self.sketch.scale * moved @ self.sketch.matrix(self.weight).mT
        weights.write(optimizer, self.weight, weight, key_of(self.sketch.seed, "compact", self.sketch.steps))
        weights.write(optimizer, self.compressed, torch.zeros_like(moved))
        self._zero_at = self.compressed._version

    def followed(self, ever: bool) -> None:
        """Whether somebody calls `take_in` after every step."""
        self._followed = ever
        self._zero_at = self._zero_at if ever else None

    def given_gradient(self) -> None:
        """An optimizer may write into `compressed` now, and not all of them tell torch that they do."""
        if not self._followed:
            self._zero_at = None

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.sketch.seed, self.sketch.steps])

    def set_extra_state(self, state: Tensor) -> None:
        self.sketch.seed, self.sketch.steps = map(int, state)

    def extra_repr(self) -> str:
        kept = f"rank={self.sketch.rank}, gap={self.sketch.gap}, scale={self.sketch.scale}"
        return f"{super().extra_repr()}, {kept}"

    def _compress(self, rank: int | float, gap: int | None, scale: float, seed: int) -> None:
        weight = self.weight.detach()
        del self.weight
        self.register_buffer("weight", weight)
        r = Projector("gaussian", rank, "right").size(self.out_features, self.in_features)
        self.compressed = nn.Parameter(weight.new_zeros(self.out_features, r))
        self.sketch = Sketch(self.in_features, r, gap, scale, seed)
        self._followed = False
        self._zero_at: int | None = self.compressed._version  # as long as it has this version, it is known to be zero

    def __getstate__(self) -> dict[str, Any]:
        """A copy is followed by nobody, and its tensors count their versions anew."""
        return {**self.__dict__, "_followed": False, "_zero_at": None}


class _Compressed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, compressed: Tensor, layer: CompAct) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x @ layer.sketch.matrix(weight).to(x.dtype), weight)
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        z, weight = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        dx = db = dc = None
        if ctx.needs_input_grad[0]:
            dx = (rows @ weight.to(dy.dtype)).reshape(*dy.shape[:-1], -1)
        if ctx.needs_input_grad[2]:
            db = rows.sum(0)
        if ctx.needs_input_grad[3]:
            dc = rows.mT @ z.reshape(-1, z.shape[-1]).to(dy.dtype)
            ctx.layer.given_gradient()
        return dx, None, db, dc, None


def _check(rank: int | float, gap: int | None, scale: float) -> None:
    Projector("gaussian", rank, "right")
    if gap is not None and (isinstance(gap, bool) or not isinstance(gap, int) or gap < 1):
        raise ValueError(f"gap={gap!r}: must be a whole number of steps from 1, or None")
    if not 0.0 < scale < math.inf:
        raise ValueError(f"scale={scale}: must be positive and finite")
