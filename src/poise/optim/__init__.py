"""Gradients -> updates: every optimizer, and the pieces they are chained from.

    from poise.optim import AdamW, Lion, Muon, Optimizer, chain
    opt = Muon(model, lr=0.02)

Named optimizers are found by their file when they are first asked for, so importing one does not import its neighbours.
"""

from __future__ import annotations

from typing import Any

from poise.catalog import ROOMS, resolve

from .optimizer import Optimizer
from .routing import Route, by_name, by_role, everything, hidden_matrices
from .transform import Chain, Context, Param, Slot, Transform, chain

__all__ = [
    "Chain",
    "Context",
    "Optimizer",
    "Param",
    "Route",
    "Slot",
    "Transform",
    "by_name",
    "by_role",
    "chain",
    "everything",
    "hidden_matrices",
]


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    return resolve(name, ROOMS["optim"])
