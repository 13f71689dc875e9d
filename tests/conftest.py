"""What holds for every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# The same examples in every run: what a change broke is then told from what chance found. `pytest --hypothesis-profile random`
# looks further.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("random", deadline=None)
settings.load_profile("same")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """One thread: tensors in tests are small, and on a busy machine a second thread is only waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def float32_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Matrices are by default not multiplied in bfloat16, whatever the processor has: what is measured must not hang on it."""
    from poise.linalg import polar

    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    polar.fast_bfloat16.cache_clear()
    yield
    monkeypatch.undo()
    polar.fast_bfloat16.cache_clear()
