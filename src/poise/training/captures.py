"""Means of what goes into layers and of the gradients at what comes out, for rules that want more of a layer than its gradient.

opt = MKOR(model)
LayerMeans(model, opt)            # once, after the optimizer and after sharding; then train as ever
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from poise.optim import Optimizer
from poise.optim.engine import shards

from .driver import Driver

FEEDS = ("input_mean", "grad_mean")


@dataclass
class _Layer:
    module: nn.Linear | nn.Conv2d
    weight: Any
    bias: Any
    inputs: list[Tensor] = field(default_factory=list)  # a mean of every backward pass since the last step
    grads: list[Tensor] = field(default_factory=list)


class LayerMeans:
    """Feeds an optimizer, before each of its steps, `input_mean` and `grad_mean` of the linear layers and 2-D convolutions.

    For each layer, over the rows r of a batch (of a convolution: over its samples, each the mean of its positions),

        a = mean_r clamp(x_r),     x the input, of a convolution its patches in the order of the weight; 1 for the bias
        g = mean_r clamp(n dL/dy_r),   n rows, y the output; dL/dy_r is then of one row's own loss

    clamped to [-clip, clip] entry by entry. Several passes before one step count alike, and ranks are averaged, with these
    vectors all that they exchange. They are fed in the shape of the parameters: a in each row of the weight, g in each column.

    Passes without a backward pass leave no trace. A layer whose weight is computed by others, as those inside of
    nn.MultiheadAttention, is not seen at work, and one whose groups share no inputs is no matrix: both are left out.

    Args:
        model: whose modules are watched. opt: whose parameters they hold; drivers may stand around it.
        clip: 100.
        grad_scale: what the loss was multiplied by, a number or a function: `scaler.get_scale`.

    `remove()` ends it, as does leaving it as a context. Raises ValueError where no layer of model is opt's.
    """

    def __init__(
        self,
        model: nn.Module,
        opt: torch.optim.Optimizer,
        *,
        clip: float = 100.0,
        grad_scale: float | Callable[[], float] = 1.0,
    ) -> None:
        if not clip > 0:
            raise ValueError(f"clip={clip}: must be positive")
        self.opt, self.clip, self.grad_scale = (opt.base if isinstance(opt, Driver) else opt), clip, grad_scale
        held = {id(p) for group in self.opt.param_groups for p in group["params"]}
        self.layers = [
            _Layer(module, module.weight, module.bias)
            for module in model.modules()
            if isinstance(module, nn.Linear | nn.Conv2d) and getattr(module, "groups", 1) == 1 and id(module.weight) in held
        ]
        if not self.layers:
            raise ValueError(f"LayerMeans(model, opt): {type(opt).__name__} holds the weight of none of the model's layers")
        self._handles: list[Any] = [layer.module.register_forward_hook(self._watch(layer)) for layer in self.layers]
        self._handles.append(self.opt.register_step_pre_hook(self._before_step))

    def remove(self) -> None:
        """Take every hook away."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> LayerMeans:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def feed(self) -> None:
        """Hand over the means of the passes since the last step, and begin anew. Every step does so by itself."""
        fed: dict[str, dict[Any, Tensor]] = {name: {} for name in FEEDS}
        for layer, (a, g) in self._averaged().items():
            weight, bias = self.layers[layer].weight, self.layers[layer].bias
            shape = tuple(weight.shape)
            fed["input_mean"][weight] = _shared(weight, a.reshape(1, *shape[1:]).expand(shape))
            fed["grad_mean"][weight] = _shared(weight, g.reshape(-1, *(1 for _ in shape[1:])).expand(shape))
            if bias is not None:
                fed["input_mean"][bias] = _shared(bias, torch.ones_like(g))
                fed["grad_mean"][bias] = _shared(bias, g)
        self.opt.feed(**fed)  # pyright: ignore[reportAttributeAccessIssue]

    def _watch(self, layer: _Layer) -> Callable[..., None]:
        def forward(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if not torch.is_grad_enabled() or not output.requires_grad:
                return
            with torch.no_grad():
                a = self._clamped(_input_rows(layer.module, args[0]))

            def backward(grad: Tensor) -> None:
                rows = grad.flatten(2).mean(2) if grad.ndim == 4 else grad.reshape(-1, grad.shape[-1])
                scale = self.grad_scale() if callable(self.grad_scale) else self.grad_scale
                layer.inputs.append(a)
                layer.grads.append(self._clamped(rows.float() * (len(rows) / scale)))

            output.register_hook(backward)

        return forward

    def _clamped(self, rows: Tensor) -> Tensor:
        return rows.float().clamp(-self.clip, self.clip).mean(0)

    def _averaged(self) -> Mapping[int, tuple[Tensor, Tensor]]:
        """The means of each layer that was at work, by its place."""
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for i, layer in enumerate(self.layers):
            if layer.grads:
                found[i] = torch.stack(layer.inputs).mean(0), torch.stack(layer.grads).mean(0)
            layer.inputs, layer.grads = [], []
        dist = torch.distributed
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1 or not found:
            return found
        flat = torch.cat([vector for pair in found.values() for vector in pair])
        dist.all_reduce(flat)
        parts = iter((flat / dist.get_world_size()).split([len(vector) for pair in found.values() for vector in pair]))
        return {i: (next(parts), next(parts)) for i in found}

    def _before_step(self, opt: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = kwargs.get("closure", next(iter(args[1:]), None))
        if closure is None:
            self.feed()
            return None

        def then_feed() -> Any:
            loss = closure()
            self.feed()
            return loss

        return args[:1], {**kwargs, "closure": then_feed}


def wanted(opt: torch.optim.Optimizer) -> bool:
    """Whether a rule of this optimizer reads what `LayerMeans` feeds."""
    base = opt.base if isinstance(opt, Driver) else opt
    rules = map(base.rule_of, base.param_groups) if isinstance(base, Optimizer) else ()
    return any(FEEDS[0] in link.feeds for rule in rules for link in rule)


def _shared(p: Any, whole: Tensor) -> Tensor:
    """This rank's piece of what every rank holds whole, as `p` is sharded."""
    return shards.like(p, shards.scatter(p, whole), tuple(p.shape), tuple(range(p.ndim)))


def _input_rows(module: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """(rows, in), or of a convolution (samples, in * kernel): the mean of the patches of each sample, without making them."""
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    x = x if x.ndim == 4 else x[None]
    mode = module.padding_mode if module.padding_mode != "zeros" else "constant"
    x = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode)
    kernel, step, spread = module.kernel_size, module.stride, module.dilation
    down, right = (
        [slice(i * d, i * d + size - (k - 1) * d, s) for i in range(k)]
        for size, k, s, d in zip(x.shape[2:], kernel, step, spread, strict=True)
    )
    means = [x[:, :, rows, columns].mean((2, 3)) for rows in down for columns in right]
    return torch.stack(means, dim=-1).flatten(1)


__all__ = ["LayerMeans", "wanted"]
