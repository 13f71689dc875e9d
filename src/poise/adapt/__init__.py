"""A trained model changed by little: adapters put beside its layers, trained, folded into weights, exported.

    from poise.adapt import LoRA, attach, export, fold
    print(attach(model, LoRA(rank=16), targets="linear"))
    ...                                                    # train, with any optimizer
    export(model, "adapter")                               # a PEFT directory, where peft knows the method
    fold(model)

Names of methods are found by their file when they are first asked for, so importing one does not import its neighbours.
"""

from __future__ import annotations

import pkgutil
from typing import Any

from poise.catalog import ROOMS, resolve

from .adaptation import Adaptation
from .attaching import Attached, adapters, attach, attached, detach, disabled
from .exporting import export
from .folding import fold, unfold
from .loading import load
from .parts import acting
from .registry import Pair, pairs

__all__ = [
    "Adaptation",
    "Attached",
    "Pair",
    "acting",
    "adapters",
    "attach",
    "attached",
    "detach",
    "disabled",
    "export",
    "fold",
    "load",
    "pairs",
    "unfold",
]


def __getattr__(name: str) -> Any:
    # `from .. import weights` in a file of this package asks here before it looks for the module
    if name.startswith("_") or name in {module.name for module in pkgutil.iter_modules(__path__)}:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return resolve(name, ROOMS["adapt"])
