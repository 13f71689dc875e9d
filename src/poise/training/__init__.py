"""What goes round a step: drivers (optimizers around optimizers), how a layer holds its weight, what is added to the loss.

    from poise.optim import Muon
    from poise.training import SAM, WeightNorm, reparameterize
    reparameterize(model, WeightNorm)
    opt = SAM(Muon(model, lr=0.02), rho=0.05)
    opt.step(closure)

Names are found by their file when they are first asked for, so importing one does not import its neighbours.
"""

from __future__ import annotations

import pkgutil
from typing import Any

from poise.catalog import ROOMS, resolve

from .captures import LayerMeans
from .driver import Driver

__all__ = ["Driver", "LayerMeans"]


def __getattr__(name: str) -> Any:
    # `from .. import weights` in a file of this package asks here before it looks for the module
    if name.startswith("_") or name in {module.name for module in pkgutil.iter_modules(__path__)}:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return resolve(name, ROOMS["training"])
