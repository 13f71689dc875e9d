"""Layers of a model as tensors and names: which are meant, how they store their weight, how one is changed in place."""

from __future__ import annotations

from .choosing import Layers, become, chooser, linears, put_first
from .rows import Rows

__all__ = ["Layers", "Rows", "become", "chooser", "linears", "put_first"]
