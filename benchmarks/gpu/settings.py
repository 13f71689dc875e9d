"""What every process of a check is told, and what it says back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Settings:
    """How a section runs.

    Attributes:
        device: a device type, "cuda" for both NVIDIA and AMD.
        quick: smaller lists and fewer rounds; what is checked stays the same.
        until: time.time() after which no further task begins.
        plugin: a Python file that every process runs first.
    """

    device: str
    quick: bool = False
    until: float = float("inf")
    plugin: str | None = None

    @property
    def seconds(self) -> float:
        """What is left."""
        return self.until - time.time()


@dataclass
class Check:
    """One statement about the device: true, false, or not looked at.

    Attributes:
        passed: None where it was not run, and `message` says why.
        figure, tolerance: what was measured, and what it may be at most.
    """

    name: str
    passed: bool | None
    figure: float | None = None
    tolerance: float | None = None
    message: str = ""

    @classmethod
    def at_most(cls, name: str, figure: float, tolerance: float, message: str = "") -> Check:
        """Passed unless the figure is above its tolerance, or no number."""
        return cls(name, figure <= tolerance, figure, tolerance, message)


@dataclass
class Found:
    """What a task found: statements, rows of a table, facts about the machine."""

    checks: list[Check] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


Task = Callable[[], Found]
Tasks = dict[str, Task]


def synchronize(device: str) -> None:
    """Wait until the device has done everything it was asked for."""
    if device != "cpu":
        torch.accelerator.synchronize()


def forget(device: str) -> None:
    """Give memory that is no longer used back, and begin to count its peak anew."""
    if device != "cpu":
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats()


def free_memory(device: str) -> int:
    """Bytes that can still be had; a gigabyte for the CPU, whose memory belongs to others too."""
    if device == "cpu":
        return 2**30
    return int(torch.accelerator.get_memory_info()[0])


def failed(name: str, error: BaseException) -> Check:
    """A statement that could not be looked at because the code for it raised."""
    return Check(name, False, message=f"{type(error).__name__}: {error}")


def first_lines(names: Iterable[str], most: int = 5) -> str:
    """Some names and how many more."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
