"""State in bfloat16 (Revisiting BFloat16 Training, arXiv 2010.06192)."""

from __future__ import annotations

import torch
from conformance.cases import mutated

from poise import catalog
from poise.memory import BFloat16
from poise.memory.codec import Codec

EVERY = torch.arange(1 << 16, dtype=torch.int32)  # the random bits that rounding looks at


def bias(codec: Codec) -> float:
    """How far the mean over all random bits is from the number, in spacings of bfloat16, at several places between two."""
    found = []
    for share in (0.01, 0.25, 0.4, 0.75):
        x = torch.full_like(EVERY, 1 + share * 2**-7, dtype=torch.float32)
        stored = codec.decode(codec.encode(x, "signed", EVERY), "signed").double()
        found.append(abs(float(stored.mean() - x[0].double())) * 2**7)
    return max(found)


def test_on_average_it_holds_the_number_itself() -> None:
    assert bias(BFloat16()) < 2**-15


def test_the_average_tells_it_from_its_mutant() -> None:
    assert bias(mutated(catalog.get("bf16"))()) > 0.3
