"""What a user may write behind --methods."""

from __future__ import annotations

import pytest

from poise import catalog
from poise.compare.entries import Entry, parse, setting


def test_an_entry_may_have_a_name_and_fixed_settings() -> None:
    found = parse("adamw, again=adamw, quick = lion(lr=1e-3, state=int8),muon(betas=(0.9, 0.99))")
    assert list(found) == ["adamw", "again", "quick", "muon"]
    assert found["again"] == Entry(catalog.get("adamw"), {})
    assert found["quick"] == Entry(catalog.get("lion"), {"lr": 1e-3, "state": "int8"})
    assert found["muon"].fixed == {"betas": (0.9, 0.99)}


def test_what_is_fixed_leaves_the_space() -> None:
    assert set(parse("adamw")["adamw"].space) - set(parse("adamw(lr=1)")["adamw"].space) == {"lr"}


@pytest.mark.parametrize(
    "text, message",
    [
        ("adamw(lr=1", "closing parenthesis"),
        ("adamw(lr=1)x", "closing parenthesis"),
        ("adamw(lr)", "NAME=VALUE"),
        ("adamw(=1)", "NAME=VALUE"),
        ("adamw,adamw", "stands twice"),
        ("a b=adamw", "is no name"),
        ("adamw,", "is no name"),
        ("adamx", "did you mean"),
    ],
)
def test_bad_entries_are_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


@pytest.mark.parametrize(
    "text, value",
    [
        ("a=1", 1),
        ("a=1e-3", 1e-3),
        ("a=int8", "int8"),
        ("a=None", None),
        ("a=(1, 2)", (1, 2)),
        ("a=True", True),
        ("a=x=y", "x=y"),
    ],
)
def test_values_are_pythons_literals_or_strings(text: str, value: object) -> None:
    assert setting(text) == ("a", value)
