"""A trainer of adapters weighed: it stands around an adapter and its optimizer, and hooks into the latter."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from poise.catalog import Method

from .adapted import HERE
from .signatures import together

ADAPTER = "adapter"  # the setting that names what is attached
GIVEN = ("model", "opt")  # parameters of a trainer that are no settings


class Staged:
    """Builds `inner`, an adapter with an optimizer of it, and `trainer` around both; settings go to whichever knows them."""

    def __init__(self, trainer: Method, inner: Method) -> None:
        self.trainer, self.inner = trainer, inner
        self.reads_losses: bool = inner.target.reads_losses  # pyright: ignore[reportFunctionMemberAccess]
        self.__wrapped__ = trainer.target  # whose source finished runs are of
        self.__name__, self.__qualname__ = trainer.name, f"{trainer.name}({ADAPTER}={inner.name})"
        settings = inspect.signature(trainer.target).parameters
        own = {name: p for name, p in settings.items() if name not in (*GIVEN, *HERE)}
        self.own = list(own)
        self.__signature__ = together(self.__qualname__, inspect.signature(inner.target).parameters, own, reserved=(ADAPTER,))

    def __call__(self, model: nn.Module, losses: Iterable[Any] | None = None, **hyper: Any) -> Optimizer:
        hyper.pop(ADAPTER, None)
        own = {name: hyper.pop(name) for name in self.own if name in hyper}
        reading = {"losses": losses} if self.reads_losses else {}
        opt = self.inner.build(model, **hyper, **reading)
        self.trainer.build(model, opt, **own, **({"seed": hyper["seed"]} if "seed" in hyper else {}))
        return opt


def staged(trainer: Method, inner: Method) -> Method:
    """The two as one method, which is tuned over the ranges of both."""
    return replace(trainer, kind="optimizer", target=Staged(trainer, inner), tune={**inner.tune, **trainer.tune})
