"""What is trained otherwise than by AdamW on an adapter does on two processes over gloo what it does on one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapt import two_processes

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    spawn: Any = torch.multiprocessing.spawn  # pyright: ignore[reportPrivateImportUsage]
    spawn(two_processes.run, (str(folder),), nprocs=two_processes.WORLD)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(two_processes.WORLD)]


@pytest.mark.parametrize("scenario", two_processes.SCENARIOS)
def test_two_processes_train_as_one(scenario: str, ranks: list[dict[str, Any]]) -> None:
    one, other = (rank[scenario] for rank in ranks)
    assert all(torch.equal(a, b) for a, b in zip(one["found"], other["found"], strict=True)), "the ranks differ"
    moved = [not torch.equal(a, b) for a, b in zip(one["found"], one["start"], strict=True)]
    assert moved == [not torch.equal(a, b) for a, b in zip(one["alone"], one["start"], strict=True)]
    assert sum(moved) == {"stages": 8, "kappa": 1}.get(scenario.split()[1] if " " in scenario else "", 6), moved
    for a, b in zip(one["found"], one["alone"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
