"""An adapter weighed: attached to a task's model, with an optimizer of what then trains; settings of both."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from poise.catalog import Method

from .driven import AROUND
from .together import Together

HERE = ("targets", "also", "seed")  # settings of `attach` itself
Losses = Iterable[Callable[[], Tensor]]


class Adapted(Together):
    """Attaches the adapter `outer` to a model and builds the optimizer `inner` of it."""

    def __init__(self, adapter: Method, base: Method) -> None:
        self.reads_losses: bool = adapter.target.reads_losses  # pyright: ignore[reportFunctionMemberAccess]
        here = {name: inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in HERE}
        super().__init__(adapter, AROUND, base, {**inspect.signature(adapter.target).parameters, **here})

    def __call__(self, model: nn.Module, losses: Losses | None = None, **hyper: Any) -> Optimizer:
        from poise.adapt import attach

        own, rest = self.parted(hyper)
        attach(model, self.outer.target, losses=losses, **own)  # pyright: ignore[reportArgumentType]
        return self.inner.build(model, **rest)


def adapted(adapter: Method, base: Method, fixed: dict[str, Any]) -> Method:
    """The two as one method, which is tuned over the ranges of both.

    Raises:
        ValueError: if `base` is no optimizer.
    """
    if base.kind != "optimizer":
        raise ValueError(f"{adapter.name}({AROUND}={base.name}): {base.name} is a {base.kind}; adapters train by an optimizer")
    return replace(adapter, kind="optimizer", target=Adapted(adapter, base), tune={**base.tune, **adapter.tune})
