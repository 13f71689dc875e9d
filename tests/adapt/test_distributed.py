"""Two processes train adapters as one does: replicas stay the same bits, shards make up the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapt import workers
from adapt.cases import NAMES

from poise import catalog

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], Any]]:
    """Results of both processes; they are started once for all methods."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(workers.run, (str(folder),), nprocs=workers.WORLD)  # pyright: ignore[reportPrivateImportUsage]
    return [torch.load(Path(folder) / f"rank{rank}.pt", weights_only=True) for rank in range(workers.WORLD)]


PAIRS = [(name, scenario) for name in NAMES for scenario in workers.SCENARIOS if scenario not in catalog.get(name).exempt]


@pytest.mark.parametrize("name, scenario", PAIRS)
def test_two_processes_train_as_one(name: str, scenario: str, ranks: list[dict[tuple[str, str], Any]]) -> None:
    """Averages and shards add in another order than one process does, and nothing else differs."""
    results = [rank[name, scenario] for rank in ranks]
    for result in results:
        assert not isinstance(result, str), result
    one, other = (result["found"] for result in results)
    assert one.keys() == results[0]["alone"].keys()
    assert any(".adapter." in key for key in one)
    assert all(torch.equal(one[key], other[key]) for key in one), "the ranks differ"
    near: dict[str, Any] = {"rtol": 0.02, "atol": 0.02} if "bfloat16" in scenario else {"rtol": 1e-4, "atol": 5e-5}
    for pairs in (("found", "alone"), ("folded",)):
        if pairs[0] in results[0]:
            found, alone = (results[0][key] for key in pairs) if len(pairs) == 2 else results[0][pairs[0]]
            for key in alone:
                torch.testing.assert_close(found[key], alone[key], **near, msg=lambda text, key=key: f"{key}: {text}")
    if "logits" in results[0]:
        torch.testing.assert_close(*results[0]["logits"], **near)
