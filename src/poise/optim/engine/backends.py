"""Which backend runs the rules on a device, and what is missing where the fast one cannot."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch

from . import kernels
from .bucket import say_once


def mode_for(device: torch.device, backend: str) -> str:
    """How rules are run on a device."""
    if backend != "auto":
        if backend not in ("tiles", "inductor", "chunks", "eager"):
            raise ValueError(f"backend={backend!r}: must be 'auto', 'tiles', 'inductor', 'chunks' or 'eager'")
        return backend
    if device.type == "cpu":
        if kernels.compiler() is not None:
            return "tiles"
        say_once(
            "poise: no C++ compiler found (CXX, g++, clang++, c++), so rules run piece by piece at about a third of the speed"
        )
        return "chunks"
    if device.type == "meta":
        return "eager"
    if device.type == "cuda" and (lacking := triton_lacks(device)) is not None:
        say_once(f"poise: {lacking}, so rules run operation by operation, at a fraction of the speed")
        return "eager"
    return "inductor"


def triton_lacks(device: torch.device) -> str | None:
    """What keeps torch.compile from this GPU, of NVIDIA or AMD; None if nothing does."""
    if importlib.util.find_spec("triton") is None:
        return "no Triton found, which torch.compile needs on a GPU"
    if "CC" not in os.environ and not any(map(shutil.which, ("gcc", "clang", "cc"))):
        return "no C compiler found (CC, gcc, clang), which Triton needs"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (7, 0):
        return f"{torch.cuda.get_device_name(device)} is older than Triton supports (compute capability 7.0)"
    return None
