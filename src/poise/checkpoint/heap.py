"""Memory that is freed and wanted again a moment later, tile after tile: kept by the process, or given back to the system.

glibc gives every larger piece back as soon as it is freed, and asks for it anew: the system then clears its pages each time,
which took a third of a merge's time. Elsewhere nothing is done here, and nothing is lost but time.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Of mallopt. What is set stays set: afterwards the sizes are those that glibc itself may grow to, and memory is given back.
TRIM, MMAP = -1, -3
KEPT = {TRIM: 2**30, MMAP: 2**25}  # 2^25 is the most that glibc takes: larger pieces always come from the system
AFTER = {TRIM: 2**26, MMAP: 2**25}


@contextmanager
def kept() -> Iterator[None]:
    """Within it, freed memory stays with the process; afterwards it is given back."""
    _set(KEPT)
    try:
        yield
    finally:
        _set(AFTER)
        give_back()


def give_back() -> None:
    """Give what is freed and kept back to the system."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _set(options: dict[int, int]) -> None:
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt") and hasattr(libc, "malloc_trim"):
        for option, value in options.items():
            libc.mallopt(option, value)
