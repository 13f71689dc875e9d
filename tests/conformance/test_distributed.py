"""Two processes over gloo do what one does: replicas stay the same bits, shards make up the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from poise.catalog import Method

from . import workers
from .problems import distance, same

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], Any]]:
    """Results of both processes; they are started once for the whole catalog."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(workers.run, (str(folder),), nprocs=workers.WORLD)  # pyright: ignore[reportPrivateImportUsage]
    return [torch.load(Path(folder) / f"rank{rank}.pt", weights_only=True) for rank in range(workers.WORLD)]


@pytest.mark.parametrize("scenario", workers.SCENARIOS)
def test_two_processes_train_as_one(entry: Method, scenario: str, ranks: list[dict[tuple[str, str], Any]]) -> None:
    """Bit for bit, unless a rule reads sums or whole matrices, whose terms may be added in another order."""
    results = [rank[entry.name, scenario] for rank in ranks]
    for result in results:
        assert not isinstance(result, str), result
    assert same(results[0]["found"], results[1]["found"]), "the ranks differ"
    found, alone = results[0]["found"], results[0]["alone"]
    assert all(not torch.equal(a, b) for a, b in zip(found, results[0]["start"], strict=True)), "something did not train"
    if results[0]["exact"]:
        assert same(found, alone)
    elif found[0].dtype is torch.bfloat16:  # one such difference may turn the rounding of an element, by 1 in 256
        assert max(float((a != b).float().mean()) for a, b in zip(found, alone, strict=True)) < 0.01
    else:
        assert distance(found, alone) < 1e-5
