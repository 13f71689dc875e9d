"""Gives every test that asks for an `entry` all drivers of the catalog, and for a `rule` all its optimizers."""

from __future__ import annotations

import pytest
from conformance.cases import entries as rules
from training.cases import entries


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "entry" in metafunc.fixturenames:
        metafunc.parametrize("entry", entries(), ids=lambda entry: entry.name)
    if "rule" in metafunc.fixturenames:
        metafunc.parametrize("rule", rules(), ids=lambda rule: rule.name)
