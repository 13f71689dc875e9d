"""Gives every test that asks for an `entry` the whole catalog, but for the entries exempt from it with a written reason."""

from __future__ import annotations

import pytest

from .cases import entries


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "entry" in metafunc.fixturenames:
        behaviour = metafunc.function.__name__.removeprefix("test_")
        chosen = [entry for entry in entries() if behaviour not in entry.exempt]
        metafunc.parametrize("entry", chosen, ids=[entry.name for entry in chosen])
