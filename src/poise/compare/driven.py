"""A driver weighed: around an optimizer of the catalog it is an optimizer of the model, with the settings of both."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from poise.catalog import Method

from .together import Together

AROUND = "around"  # the setting that names the inner optimizer
MODEL = ("model", "layers")  # parameters of drivers that are given the model


class Driven(Together):
    """Builds the optimizer `inner` of a model and the driver `outer` around it."""

    def __init__(self, driver: Method, base: Method) -> None:
        mine = dict(list(inspect.signature(driver.target).parameters.items())[1:])
        self.models = [name for name in MODEL if name in mine]
        super().__init__(driver, AROUND, base, {name: p for name, p in mine.items() if name not in MODEL})

    def __call__(self, model: nn.Module, **hyper: Any) -> Optimizer:
        own, rest = self.parted(hyper)
        return self.outer.build(self.inner.build(model, **rest), **own, **dict.fromkeys(self.models, model))


def driven(driver: Method, base: Method, fixed: dict[str, Any]) -> Method:
    """The two as one method, which is tuned over the ranges of both.

    Raises:
        ValueError: if `base` is no optimizer, or the driver needs what a task does not have.
    """
    if base.kind != "optimizer":
        raise ValueError(
            f"{driver.name}({AROUND}={base.name}): {base.name} is a {base.kind}; a driver stands around an optimizer"
        )
    target = Driven(driver, base)
    tune = {**base.tune, **driver.tune}
    needed = [
        name
        for name, p in target.__signature__.parameters.items()
        if name in target.own and p.default is p.empty and name not in tune and name not in fixed
    ]
    if needed:
        raise ValueError(f"{driver.name} needs {needed[0]}=..., which a task does not have; it cannot be weighed here")
    return replace(driver, kind="optimizer", target=target, tune=tune)
