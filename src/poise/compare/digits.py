"""Numbers as a reader wants them: as many digits as the interval leaves meaning to."""

from __future__ import annotations

import math
from typing import Any

from poise.compare.results import Interval, Speedup

DIVERGED = "diverged"
BOUNDS = {"exact": "", "at least": "≥ ", "at most": "≤ "}


def half(value: Interval) -> float | None:
    """Half the width of an interval that has bounds."""
    return None if value.low is None or value.high is None else (value.high - value.low) / 2


def number(value: float, unsure: float | None = None, sign: str = "") -> str:
    """`value` in five digits, or down to the second digit of what it is unsure by."""
    if not unsure:
        return f"{value:{sign}.5g}"
    decimals = 1 - math.floor(math.log10(unsure))
    if decimals <= 6:
        return f"{round(value, decimals):{sign}.{max(decimals, 0)}f}"
    digits = decimals + math.floor(math.log10(abs(value))) + 1 if value else 1
    return f"{value:{sign}.{max(digits, 1)}g}"


def spread(value: Interval | None, sign: str = "") -> str:
    """Mean and half width."""
    if value is None:
        return DIVERGED
    unsure = half(value)
    if unsure is None:
        return number(value.mean, sign=sign)
    return f"{number(value.mean, unsure, sign)} ± {number(unsure, unsure)}"


def ratio(value: Speedup) -> str:
    """A speed-up, as a bound where it is one."""
    return f"{BOUNDS[value.bound]}{value.ratio:.2f}×"


def setting(value: Any) -> str:
    """A hyper-parameter's value."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
