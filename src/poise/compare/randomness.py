"""Every global generator that a model or a task's file may draw from: torch's, Python's and numpy's legacy one."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def devices(device: str) -> list[int]:
    """The CUDA devices whose generator a run on `device` moves on."""
    kind = torch.device(device)
    return [kind.index or 0] if kind.type == "cuda" else []


@contextmanager
def own(seed: int, device: str = "cpu") -> Iterator[None]:
    """All generators seeded inside, and as they were outside."""
    before = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=devices(device)):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002


def state(device: str) -> dict[str, Any]:
    """Where all generators are, as tensors and plain values: a checkpoint holds it and no pickled object."""
    version, words, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "device": [torch.cuda.get_rng_state(index) for index in devices(device)],
        "python": [version, list(words), gauss],
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
    }


def set_state(state: Mapping[str, Any], device: str) -> None:
    """Put all generators where they were."""
    torch.set_rng_state(state["torch"].cpu())  # a map_location may have moved it
    for index, one in zip(devices(device), state["device"], strict=False):  # a run may go on on another device
        torch.cuda.set_rng_state(one.cpu(), index)
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))  # noqa: NPY002
