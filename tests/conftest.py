"""What holds for every test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# The same examples in every run: what a change broke is then told from what chance found. `pytest --hypothesis-profile random`
# looks further.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("random", deadline=None)
settings.load_profile("same")

# Files that take long, the longest first: with several processes none is then left to one of them at the end. Those of the
# conformance suite come before the processes it starts, which find its kernels on disk.
LONGEST = (
    "conformance/test_rule.py", "conformance/test_surface.py", "conformance/test_state.py", "conformance/test_tensors.py",
    "conformance/test_formats.py", "conformance/test_distributed.py", "benchmarks/test_gpu_check.py",
    "optim/engine/test_kernels.py", "compare/test_report_browser.py", "compare/test_coordinate.py", "compare/test_workers.py",
    "compare/test_tasks.py", "compare/test_study.py", "cli/test_compare.py", "optim/engine/test_blocks.py",
    "optim/engine/test_backends.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files named above before the others, whose order stays."""
    ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(LONGEST)}
    assert all(path.exists() for path in ranks), f"no such file: {[str(path) for path in ranks if not path.exists()]}"
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


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
