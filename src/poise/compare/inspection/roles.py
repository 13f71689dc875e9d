"""One colour and one symbol for each role, in every chart of a page."""

from __future__ import annotations

from poise.checkpoint.inspecting import Inspection, Tensor
from poise.checkpoint.structure import ROLES
from poise.compare.report.looks import DASHES, HUES, SYMBOLS, Look

PLAIN = ("norm", "bias", "vector", "buffer")  # no maps: their numbers would hide those of the matrices


def drawn(tensor: Tensor) -> bool:
    """Whether a tensor is a map, and has entries to speak of."""
    return tensor.described.role not in PLAIN and tensor.statistics.rms > 0


def looks(found: Inspection) -> dict[str, Look]:
    """The look of every role that is drawn, in the order of `ROLES`."""
    present = {tensor.described.role for tensor in found.tensors if tensor.described.role not in PLAIN}
    seen = {}
    for place, role in enumerate(role for role in ROLES if role in present):
        turn, index = divmod(place, len(HUES))
        seen[role] = Look(index, SYMBOLS[place % len(SYMBOLS)], DASHES[turn % len(DASHES)])
    return seen
