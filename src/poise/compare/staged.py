"""A trainer of adapters weighed: it stands around an adapter and its optimizer, and hooks into the latter."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from poise.catalog import Method

from .adapted import HERE, Losses
from .together import Together

ADAPTER = "adapter"  # the setting that names what is attached
GIVEN = ("model", "opt")  # parameters of a trainer that are no settings


class Staged(Together):
    """Builds `inner`, an adapter with an optimizer of it, and the trainer `outer` around both."""

    def __init__(self, trainer: Method, inner: Method) -> None:
        self.reads_losses: bool = inner.target.reads_losses  # pyright: ignore[reportFunctionMemberAccess]
        settings = inspect.signature(trainer.target).parameters
        super().__init__(trainer, ADAPTER, inner, {n: p for n, p in settings.items() if n not in (*GIVEN, *HERE)})

    def __call__(self, model: nn.Module, losses: Losses | None = None, **hyper: Any) -> Optimizer:
        own, rest = self.parted(hyper)
        opt = self.inner.build(model, **rest, **({"losses": losses} if self.reads_losses else {}))
        self.outer.build(model, opt, **own, **({"seed": rest["seed"]} if "seed" in rest else {}))
        return opt


def staged(trainer: Method, inner: Method) -> Method:
    """The two as one method, which is tuned over the ranges of both."""
    return replace(trainer, kind="optimizer", target=Staged(trainer, inner), tune={**inner.tune, **trainer.tune})
