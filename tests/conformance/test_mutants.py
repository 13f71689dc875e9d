"""Every entry of the catalog names a mistake of its own, and a test of its own makes it."""

from __future__ import annotations

import re
from functools import cache

import pytest

from poise.catalog import Method, methods
from poise.memory.codec import CODECS

from .cases import TESTS, entries, mutated

# `mutated(catalog.get("halo"))`, as a test makes the mistake of one entry.
MADE = re.compile(r"""\bmutated\(\s*(?:\w+\.)?get\(\s*"([^"]+)"\s*\)""")


@cache
def made() -> frozenset[str]:
    """Names of the entries whose mistake some test makes: of optimizers, drivers, merges in a sweep, of others one by one."""
    swept = [*entries(), *(entry for entry in methods() if entry.kind in ("driver", "merge"))]
    named = (name for file in TESTS.rglob("test_*.py") for name in MADE.findall(file.read_text()))
    return frozenset({entry.name for entry in swept}.union(named))


@pytest.mark.parametrize("one", methods(), ids=lambda one: one.name)
def test_the_mistake_that_an_entry_names_can_be_made_and_a_test_makes_it(one: Method) -> None:
    known = dict(CODECS)
    wrong = mutated(one)
    assert wrong is not one.target and wrong.__name__ == one.target.__name__
    assert CODECS.keys() == known.keys() and all(CODECS[name] is codec for name, codec in known.items())
    assert one.name in made(), f"no test makes the mistake that {one.name} names: mutated(catalog.get({one.name!r}))"
