"""Runs in several processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compare.toys import ADAM, SETTINGS, SGD, Toy, without_seconds
from poise.compare.entries import Entry
from poise.compare.journal import Journal
from poise.compare.study import Nobody, compare
from poise.compare.workers import Pool, WorkerKilled, threads

ENTRIES = {"sgd": Entry(SGD), "adamw": Entry(ADAM)}
BUDGETS = SETTINGS.model_copy(update={"trials": 4, "budgets": (0.5,)})


class Deadly(Toy):
    """Kills the process that trains it."""

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(model, batch)


class Slow(Toy):
    """Takes its time, and says who is at work."""

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        Path(os.environ["POISE_TEST_FOLDER"], str(os.getpid())).touch()
        time.sleep(0.02)
        return super().loss(model, batch)


class Count(Nobody):
    taken = 0

    def advance(self, passes: int) -> None:
        self.taken += passes


def test_two_workers_make_the_study_that_one_makes(tmp_path: Path) -> None:
    alone, together = Count(), Count()
    whole = compare(Toy(), ENTRIES, BUDGETS, Journal(tmp_path / "one.db"), alone)
    with Pool(Toy(), ENTRIES, 2) as pool:
        found = compare(Toy(), ENTRIES, BUDGETS, Journal(tmp_path / "two.db"), together, workers=pool)
    assert without_seconds(found) == without_seconds(whole)
    assert together.taken == alone.taken > 0


def test_a_worker_that_is_killed_ends_the_comparison_with_advice(tmp_path: Path) -> None:
    with Pool(Deadly(), ENTRIES, 2) as pool, pytest.raises(WorkerKilled, match="fewer --workers"):
        compare(Deadly(), ENTRIES, SETTINGS, Journal(tmp_path / "journal.db"), workers=pool)


CHILD = """
import sys
from pathlib import Path
from compare.test_workers import ENTRIES, Slow
from compare.toys import SETTINGS
from poise.compare import Journal, compare
from poise.compare.workers import Pool
if __name__ == "__main__":
    with Pool(Slow(), ENTRIES, 2) as pool:
        compare(Slow(), ENTRIES, SETTINGS, Journal(Path(sys.argv[1])), workers=pool)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_do_not_outlive_the_comparison(tmp_path: Path, how: signal.Signals) -> None:
    script, folder = tmp_path / "child.py", tmp_path / "pids"
    script.write_text(CHILD)
    folder.mkdir()
    tests = str(Path(__file__).parents[1])
    environment: dict[str, Any] = os.environ | {"PYTHONPATH": os.pathsep.join([tests, *filter(None, sys.path)])}
    environment["POISE_TEST_FOLDER"] = str(folder)
    child = subprocess.Popen([sys.executable, str(script), str(tmp_path / "j.db")], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(folder.iterdir())) < 2:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(how)
    child.wait(60)
    pids = [int(path.name) for path in folder.iterdir()]
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_the_callers_threads_come_back() -> None:
    before = torch.get_num_threads()
    with threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
