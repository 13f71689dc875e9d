"""What gradients of the weights themselves say before anything trains: sums over some batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from poise.linalg.lengths import wide

from .targets import Place


def summed_gradients(model: nn.Module, places: Sequence[Place], losses: Iterable[Callable[[], Tensor]]) -> dict[str, Tensor]:
    """Sums of the gradients of the places' weights over all losses, by path, as (outputs, inputs), in float32 at least.

    A layer's gradient is added to its sum and freed as soon as the backward pass has it, so that there are never two layers'
    at once. Afterwards gradients, buffers, and what has gradients, are as they were. A weight that a loss does not reach
    adds nothing.

    Args:
        losses: each is asked once, one after another.

    Raises:
        ValueError: a sum is not finite.
    """
    with torch.no_grad():
        sums = {place.path: torch.zeros_like(place.layout.rows.view(wide(place.layer.weight.detach()))) for place in places}
    by_weight = {id(place.layer.weight): place for place in places}

    def add(weight: Tensor) -> None:
        place = by_weight[id(weight)]
        if weight.grad is not None:
            sums[place.path] += place.layout.rows.view(weight.grad)
            weight.grad = None

    with _only(model, [place.layer.weight for place in places]), torch.enable_grad():
        hooks = [place.layer.weight.register_post_accumulate_grad_hook(add) for place in places]
        try:
            for loss in losses:
                loss().backward()
        finally:
            for hook in hooks:
                hook.remove()
    for path, total in sums.items():
        if not bool(torch.isfinite(total).all()):
            raise ValueError(f"losses: the gradient of '{path}.weight' is not finite; look at the batches that they are of")
    return sums


@contextmanager
def _only(model: nn.Module, weights: Sequence[Tensor]) -> Iterator[None]:
    """Within it these alone have gradients, none at first."""
    chosen = {id(weight) for weight in weights}
    params = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        for p, _, _ in params:
            p.grad = None
            p.requires_grad_(id(p) in chosen)
        yield
    finally:
        for p, trained, grad in params:
            p.requires_grad_(trained)
            p.grad = grad
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
