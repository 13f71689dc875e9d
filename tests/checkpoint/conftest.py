"""What holds for tests of weights on disk."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here must outlive a power failure, and a busy disk takes its time to say that it is done."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
