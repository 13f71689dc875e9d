"""HALO: linear layers all of whose products are of 8 or 6 bits, with rotations against outliers."""

from __future__ import annotations

from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from poise.catalog import Paper, choice, method
from poise.linalg.hadamard import hadamard, padded
from poise.linalg.lengths import wide
from poise.linalg.low_precision import Precision, product, quantize, turned
from poise.modules import Layers, become, linears
from poise.optim.routing.roles import output_heads

M = TypeVar("M", bound=nn.Module)
Level = Literal[0, 1, 2]
LEVELS: dict[str, Level] = {"int8": 2, "fp8": 0, "fp6": 2, "none": 2}


@method(
    "halo",
    family="training",
    kind="layer",
    paper=Paper("HALO: Hadamard-Assisted Lower-Precision Optimization for LLMs", arxiv="2501.02625", year=2025),
    tune={"precision": choice("int8", "fp8"), "level": choice(0, 1, 2)},
    mutant=("0, inverse=True)[:tokens]", "0)[:tokens]"),
)
class HALO(nn.Linear):
    """A linear layer whose output, input gradient and weight gradient are products of quantized matrices.

    Q rounds a matrix to codes with one scale, and H, H_t are orthonormal Hadamard matrices of the sizes of input and tokens:

        level 0    y = Q(x) Q(W)^T              dx = Q(dy) Q(W)                        dW = Q(dy)^T Q(x)
        level 1    y = Q(x H) Q(W H)^T          dx = Q(dy) Q(W H) H^T                  dW = Q(dy)^T Q(x H) H^T
        level 2    as level 1                   dx = H_t^T Q(H_t dy) Q(W H) H^T        as level 1

    Rotations cancel in exact arithmetic. Before rounding they share an outlier feature among all features, and in level 2 an
    outlier token of dy among all tokens, so that one large number no longer sets the scale for everything else. Backward takes
    the quantized matrices that forward has made. The bias is added, and its gradient summed, in full precision.

        HALO.attach(model, precision="int8")
        opt = AdamW(model)
        ...
        HALO.detach(model)                  # plain nn.Linear; the weights have been in full precision all the time

    Args:
        precision: "int8"; "fp8", e4m3; "fp6", e3m2; "none" rounds nothing. On a CPU int8 products are whole numbers and exact,
            the others are emulated in float32: a look at what training would do, and no gain in speed.
        level: None: 2 for int8 and fp6, 0 for fp8, whose exponent bears outliers by itself.

    Raises:
        ValueError: for another precision or level.

    A weight that does not require a gradient (the base under an adapter) takes part in y and dx only, and no input is kept.
    Where no Hadamard matrix has the size, zeros are added up to the next one, which changes nothing else.
    Memory: autograd keeps a byte for each entry of x, and one for each of W. Source: "HALO: Hadamard-Assisted Lower-Precision
    Optimization for LLMs" (arXiv 2501.02625) and its code, which takes no bias. Its sharded communication is left out; the
    format of FP6 and its scale, max |.| / 28, are those of the code's other FP6 paths.
    """

    precision: Precision
    level: Level

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        precision: Precision = "int8",
        level: Level | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check(precision, level)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.precision, self.level = precision, LEVELS[precision] if level is None else level

    @classmethod
    def attach(cls, model: M, layers: Layers | None = None, *, precision: Precision = "int8", level: Level | None = None) -> M:
        """Make linear layers of `model` such ones, in place, before or after the optimizer is made; returns `model`.

        Args:
            model: a module; it may be such a layer itself.
            layers: a glob of paths, or a function of path and layer. None for every plain nn.Linear but output heads.
            precision, level: see the class.

        Raises:
            TypeError, ValueError: no such layer, or one that is not plain. Nothing has been changed then.
        """
        _check(precision, level)
        heads = output_heads([model])
        for _, layer in linears(model, layers, lambda _, one: type(one) is nn.Linear and one not in heads):
            made = become(layer, cls)
            made.precision, made.level = precision, LEVELS[precision] if level is None else level
        return model

    @staticmethod
    def detach(model: M) -> M:
        """Make plain nn.Linear of the model's `HALO` layers, in place; returns `model`. Their parameters stay the same ones."""
        for layer in model.modules():
            if isinstance(layer, HALO):
                del layer.precision, layer.level
                become(layer, nn.Linear)
        return model

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        result: Any = _Quantized.apply(input, self.weight, self.bias, self.precision, self.level, dtype)
        return result

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, precision={self.precision!r}, level={self.level}"


class _Quantized(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, precision: Precision, level: Level, dtype: torch.dtype
    ) -> Tensor:
        rows = wide(x).reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):  # precision is this layer's business
            qx, qw = (quantize(_rotated(t) if level else t, precision) for t in (rows, wide(weight)))
            y = product(qx, turned(qw), precision)
        y = y if bias is None else y + bias
        ctx.precision, ctx.level, ctx.features = precision, level, x.shape[-1]
        for_weight = qx if ctx.needs_input_grad[1] else (None, None)
        for_input = qw if ctx.needs_input_grad[0] else (None, None)
        ctx.save_for_backward(*for_weight, *for_input)
        return y.to(dtype).reshape(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        *qx, w_codes, w_scale = ctx.saved_tensors
        precision, level, features = ctx.precision, ctx.level, ctx.features
        rows = wide(dy).reshape(-1, dy.shape[-1])
        plain = quantize(rows, precision) if ctx.needs_input_grad[1] or level < 2 else None
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            if level == 2:
                tokens = len(rows)
                mixed = quantize(hadamard(pad(rows, (0, 0, 0, padded(max(tokens, 1)) - tokens)), 0), precision)
                dx = hadamard(product(mixed, (w_codes, w_scale), precision), 0, inverse=True)[:tokens]
            else:
                assert plain is not None
                dx = product(plain, (w_codes, w_scale), precision)
            dx = (_back(dx, features) if level else dx).reshape(*dy.shape[:-1], features)
        if ctx.needs_input_grad[1]:
            assert plain is not None
            dw = product(turned(plain), (qx[0], qx[1]), precision)
            dw = _back(dw, features) if level else dw
        if ctx.needs_input_grad[2]:
            db = rows.sum(0)
        return dx, dw, db, None, None, None


def _rotated(rows: Tensor) -> Tensor:
    """Each row rotated, after zeros up to a size that there is a Hadamard matrix of."""
    return hadamard(pad(rows, (0, padded(rows.shape[1]) - rows.shape[1])))


def _back(rows: Tensor, features: int) -> Tensor:
    """What `_rotated` has rotated, without the zeros."""
    return hadamard(rows, inverse=True)[:, :features]


def _check(precision: str, level: int | None) -> None:
    if precision not in get_args(Precision):
        raise ValueError(f"precision={precision!r}: must be one of {', '.join(map(repr, get_args(Precision)))}")
    if level is not None and (isinstance(level, bool) or level not in get_args(Level)):
        raise ValueError(f"level={level!r}: must be 0, 1, 2 or None")
