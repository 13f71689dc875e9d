"""Takes the steps that `measure` watches: python -m poise.compare.needs.child TOLD TASK METHOD SETTINGS SEED DEVICE."""

from __future__ import annotations

import gc
import json
import sys
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from poise import catalog
from poise.checkpoint.heap import give_back
from poise.compare import randomness, tasks
from poise.compare.entries import Entry, entry_of, setting
from poise.compare.loop import Loop
from poise.compare.needs.measure import anonymous

STEPS = 3  # the first makes the state; in a later one everything is there at once


def main(told: str, task: str, method: str, settings: str, seed: str, device: str) -> None:
    def tell(**known: float) -> None:
        with Path(told).open("a") as file:
            file.write(json.dumps(known) + "\n")

    problem = tasks.load(task)
    entry = entry_of(catalog.get(method), dict(setting(text) for text in json.loads(settings)))
    warm(entry)
    gc.collect()
    give_back()
    tell(baseline=anonymous())
    cuda = device.startswith("cuda")
    with randomness.own(int(seed), device):
        loop = Loop(problem, lambda model: entry.build(model, problem), seed=int(seed), passes=STEPS, device=device)
        for _ in range(STEPS):
            loop.step()
        if cuda:
            between = torch.cuda.memory_allocated()
            tell(cuda_peak=torch.cuda.max_memory_allocated(), cuda_between=between)
        loop.optimizer.zero_grad()
        gc.collect()
        give_back()
        tell(between=anonymous())
        tell(done=1)


def warm(entry: Entry) -> None:
    """Take a step on a small model, so that what is compiled and imported by the first one does not count."""
    with suppress(Exception):  # a method may need more than two layers have
        model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 128))
        optimizer = entry.build(model)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(torch.ones(2, 128)).square().mean()
            loss.backward()
            return loss

        for _ in range(2):
            optimizer.step(closure)  # pyright: ignore[reportCallIssue, reportArgumentType]


if __name__ == "__main__":
    main(*sys.argv[1:])
