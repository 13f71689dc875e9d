"""What a GPT that has learned to read prose still knows of Python, which it read before."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from text_domains import Text
from torch import Tensor

from poise.compare.entries import parse
from poise.compare.loop import evaluate
from poise.compare.results import Results, Run, write_whole
from poise.compare.tasks import Split
from poise.compare.train import train

from .studies import PROSE

Losses = Mapping[str, Sequence[float | None]]  # on Python, by method and seed, None: diverged; BASE: before it read prose
BASE = "before"


class Before(Text):
    """Trains on prose as the study does, and reports on Python."""

    def __init__(self, start: Path) -> None:
        super().__init__(("prose",), start)

    def batches(self, split: Split, seed: int) -> Iterator[Tensor]:
        return Text(("python",)).batches(split, seed) if split == "report" else super().batches(split, seed)


def measure(results: Results, start: Path, seeds: int, file: Path, workers: int) -> None:
    """Trains the first `seeds` final runs of every method again, and writes what each then makes of Python to `file`.

    Raises:
        RuntimeError: a run does not go as it did in the comparison.
    """
    jobs = [(start, found.name, run, results.settings.steps) for found in results.methods for run in found.finals[:seeds]]
    task = Before(start)
    found: dict[str, list[float | None]] = {BASE: [evaluate(task, task.model(), "report", 0)]}
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for name, loss in pool.imap(_again, jobs):
            found.setdefault(name, []).append(loss)
            print(f"{name}: {loss}", flush=True)
    write_whole(file, json.dumps(found, indent=1) + "\n")


def _again(job: tuple[Path, str, Run, int]) -> tuple[str, float | None]:
    start, name, before, steps = job
    torch.set_num_threads(1)
    entry = parse(",".join(PROSE.methods))[name]
    run = train(Before(start), entry, before.hyper, number=before.number, seed=before.seed, passes=steps, split="report")
    if run.curve != [tuple(point) for point in before.curve]:
        raise RuntimeError(f"{name}, seed {before.seed}: the run does not go as it did; run the study again first")
    return name, run.loss


def read(file: Path) -> Losses:
    """Nothing where it was not measured."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def forgotten(losses: Losses, name: str) -> list[float | None]:
    """By seed, how much the loss on Python rose; None where the run diverged."""
    (before,) = losses[BASE]
    assert before is not None
    return [None if loss is None else loss - before for loss in losses[name]]
