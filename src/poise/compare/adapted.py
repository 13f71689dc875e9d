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
from .signatures import together

HERE = ("targets", "also", "seed")  # settings of `attach` itself
Losses = Iterable[Callable[[], Tensor]]


class Adapted:
    """Attaches `adapter` to a model and builds the optimizer `base` of it. Settings go to whichever of the two knows them."""

    def __init__(self, adapter: Method, base: Method) -> None:
        self.adapter, self.base = adapter, base
        self.reads_losses: bool = adapter.target.reads_losses  # pyright: ignore[reportFunctionMemberAccess]
        self.__wrapped__ = adapter.target  # whose source finished runs are of
        self.__name__, self.__qualname__ = adapter.name, f"{adapter.name}({AROUND}={base.name})"
        inside = dict(inspect.signature(base.target).parameters)
        mine = dict(inspect.signature(adapter.target).parameters)
        self.own = [*mine, *HERE]
        here = {name: inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in HERE}
        self.__signature__ = together(self.__qualname__, inside, {**mine, **here}, reserved=(AROUND,))

    def __call__(self, model: nn.Module, losses: Losses | None = None, **hyper: Any) -> Optimizer:
        from poise.adapt import attach

        hyper.pop(AROUND, None)
        own = {name: hyper.pop(name) for name in self.own if name in hyper}
        attach(model, self.adapter.target, losses=losses, **own)  # pyright: ignore[reportArgumentType]
        return self.base.build(model, **hyper)


def adapted(adapter: Method, base: Method, fixed: dict[str, Any]) -> Method:
    """The two as one method, which is tuned over the ranges of both.

    Raises:
        ValueError: if `base` is no optimizer.
    """
    if base.kind != "optimizer":
        raise ValueError(f"{adapter.name}({AROUND}={base.name}): {base.name} is a {base.kind}; adapters train by an optimizer")
    return replace(adapter, kind="optimizer", target=Adapted(adapter, base), tune={**base.tune, **adapter.tune})
