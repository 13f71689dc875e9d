"""Section 5: many devices, or one that is told to be many of one, train as a single process does."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import ranks
from .catalog import distance, entries, same
from .settings import Check, Found, Settings, Tasks

# Sums and products over ranks are added in another order than in one process.
NEAR = 1e-5
# In bfloat16 such a difference may turn an element's rounding. With the gradients of a real backward pass, a rule that takes
# signs may turn where a gradient is next to nothing. Share of elements.
APART = 0.01
REAL = ("ddp", "fsdp backward", "fsdp offloaded")


class Lost(RuntimeError):
    """The ranks cannot go on; the next attempt needs new ones."""


def tasks(settings: Settings) -> Tasks:
    """One for each scenario and entry; the ranks are started with the first that is asked for, and go through the rest."""
    todo = [(entry.name, name) for name in ranks.scenarios(settings.device) for entry in entries()]
    team = Team(todo, settings)
    return {f"sharded {scenario}: {name}": partial(team.check, i) for i, (name, scenario) in enumerate(todo)}


class Team:
    """A process for every device (two on a CPU), all going through the same list."""

    def __init__(self, todo: list[tuple[str, str]], settings: Settings) -> None:
        self.todo, self.settings = todo, settings
        self.world = 2 if settings.device == "cpu" else torch.accelerator.device_count()
        self.context: Any = None
        self.folder = tempfile.mkdtemp(dir=Path.cwd())  # which run.py made, and takes away
        self.first = 0

    def check(self, i: int) -> Found:
        """What came of task i."""
        name, scenario = self.todo[i]
        if self.context is None:
            self.first = i
            device, plugin = self.settings.device, self.settings.plugin
            args = (device, self.world, self.folder, self.todo[i:], plugin)
            self.context = torch.multiprocessing.spawn(ranks.run, args, nprocs=self.world, join=False)  # pyright: ignore[reportPrivateImportUsage]
        results = self.results(i - self.first)
        return Found(judged(f"sharded: {name}: {scenario}, world of {self.world}", scenario, results))

    def results(self, number: int) -> list[dict[str, Any]]:
        """Every rank's, or Lost with what one of them said."""
        files = [Path(self.folder, f"{number}-{rank}.pt") for rank in range(self.world)]
        waited: float | None = None
        while True:
            there = [torch.load(file, weights_only=True) if file.exists() else None for file in files]
            said = next((result for result in there if isinstance(result, str)), None)
            if all(result is not None for result in there):
                if said is not None:
                    raise (RuntimeError if all(isinstance(r, str) for r in there) else Lost)(said.strip().splitlines()[-1])
                return there  # type: ignore[return-value]
            if said is not None:  # the others wait for this one in vain
                waited = waited or time.time()
                if time.time() - waited > 5:
                    raise Lost(said.strip().splitlines()[-1])
            try:
                ended = self.context.join(timeout=0.05)
            except Exception as error:
                raise Lost(str(error).strip().splitlines()[-1]) from error
            if ended and not all(file.exists() for file in files):
                raise Lost("the ranks ended without a result")


def judged(title: str, scenario: str, results: list[dict[str, Any]]) -> list[Check]:
    """That the ranks agree, that everything moved, and that one process gets there too."""
    first = results[0]
    found, alone = first["found"], first["alone"]
    moved = all(not torch.equal(a, b) for a, b in zip(found, first["start"], strict=True))
    equal = all(same(result["found"], found) for result in results)
    said = "" if equal and moved else "the ranks differ" if not equal else "a parameter did not move"
    checks = [Check(f"{title}: replicas are the same bits", equal and moved, message=said)]
    name = f"{title}: as one process"
    if first["exact"] and scenario not in REAL:
        return [*checks, Check.at_most(name, distance(found, alone), 0.0, "largest distance of a weight")]
    if found[0].dtype is torch.bfloat16:
        return [*checks, Check.at_most(name, share(found, alone, torch.ne), APART, "share of weights that differ")]
    if scenario in REAL:
        far = share(found, alone, lambda a, b: (a - b).abs() > NEAR)
        return [*checks, Check.at_most(name, far, APART, f"share of weights further than {NEAR:g}")]
    return [*checks, Check.at_most(name, distance(found, alone), NEAR, "largest distance of a weight")]


def share(found: list[Tensor], wanted: list[Tensor], differ: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Of all elements of two lists of tensors, how many differ."""
    apart = sum(int(differ(a, b).sum()) for a, b in zip(found, wanted, strict=True))
    return apart / sum(b.numel() for b in wanted)
