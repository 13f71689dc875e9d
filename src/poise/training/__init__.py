"""What goes round a step: how a layer holds its weight, what is added to the loss, what steers the optimizer from outside.

    from poise.training import WeightNorm, fold, reparameterize
    reparameterize(model, WeightNorm)

Names are found by their file when they are first asked for.
"""

from __future__ import annotations

from typing import Any

from poise.catalog import ROOMS, resolve


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    return resolve(name, ROOMS["training"])
