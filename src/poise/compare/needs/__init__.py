"""What a training step needs: bytes of weights, gradients, optimizer state and activations, part by part, and the peak.

    found = needs(tasks.load("code-lm"), entry_of(catalog.get("adamw"), {"state": "int4"}))
    found.parts, found.total, found.peak

Bytes are counted without holding a weight where the model allows it, on torch's meta device; the peak is measured on real steps
in a process of its own where the machine has room for them.
"""

from poise.compare.needs.count import Needs, Part, count
from poise.compare.needs.measure import Peak, available, measure

__all__ = ["Needs", "Part", "Peak", "available", "count", "measure"]
