"""The catalog as the conformance tests know it: how each entry is built, and weights and gradients to run it on."""

from __future__ import annotations

import importlib.util
import sys
from unittest.mock import MagicMock

# Test files say how their entry is built (`TYPICAL`, `build`). None of their tests is run here, so that they can be read where
# there is torch but no test tool.
for tool in ("pytest", "hypothesis", "hypothesis.strategies"):
    if tool not in sys.modules and importlib.util.find_spec(tool.partition(".")[0]) is None:
        sys.modules[tool] = MagicMock()

from conformance.cases import STATES, build, entries, net  # noqa: E402
from conformance.problems import SHAPES, Grads, distance, draw, leaves, play, same  # noqa: E402

__all__ = ["SHAPES", "STATES", "Grads", "build", "distance", "draw", "entries", "leaves", "net", "play", "same"]
