"""What the harness costs: steps of poise's training loop beside a bare one, in turns in one process.

    python benchmarks/overhead.py [--tasks code-lm,digits] [--rounds 40] [--json]

Both train the same model with the same optimizer, schedule and data; the bare loop is what one would write by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median, quantiles

import torch
from torch.optim.lr_scheduler import LambdaLR

from poise import catalog
from poise.compare import randomness, tasks
from poise.compare.entries import Entry
from poise.compare.loop import Loop, warmup_then_decay

STEPS = 20  # in a turn


def bare(task: tasks.Task, entry: Entry, passes: int) -> Callable[[], None]:
    """A training loop without poise's."""
    model = task.model()
    optimizer = entry.build(model)
    schedule = LambdaLR(optimizer, lambda step: warmup_then_decay(step, passes))
    stream = task.batches("train", 0)
    model.train()

    def step() -> None:
        batch = next(stream)
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()
        optimizer.step()
        schedule.step()

    return step


def harness(task: tasks.Task, entry: Entry, passes: int) -> Callable[[], None]:
    """poise's loop, as `train` drives it."""
    loop = Loop(task, entry.build, seed=0, passes=passes)

    def step() -> None:
        assert not loop.finished and not loop.hopeless
        loop.step()

    return step


def seconds(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    for _ in range(STEPS):
        step()
    return (time.perf_counter() - started) / STEPS


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What the harness costs.")
    parser.add_argument("--tasks", default="code-lm,digits")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    found = {}
    for name in args.tasks.split(","):
        task, entry = tasks.load(name), Entry(catalog.get("adamw"))
        passes = 4 * STEPS * (args.rounds + 1)
        with randomness.own(0):
            makers = {"bare": bare, "null": bare, "harness": harness}
            steps = {key: make(task, entry, passes) for key, make in makers.items()}
            for step in steps.values():
                seconds(step)
            taken: dict[str, list[float]] = {key: [] for key in steps}
            for number in range(args.rounds):
                for key in list(steps)[:: 1 if number % 2 else -1]:
                    taken[key].append(seconds(steps[key]))
        row = {"ms": 1e3 * median(taken["bare"])}
        for key in ("null", "harness"):
            ratios = [ours / theirs for ours, theirs in zip(taken[key], taken["bare"], strict=True)]
            low, middle, high = quantiles(ratios, n=4)
            row |= {key: middle, f"{key}_low": low, f"{key}_high": high}
        found[name] = row
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    print("task        bare step, ms   bare against itself     poise's loop against bare")
    for name, row in found.items():
        null, ours = (f"{row[k]:.3f} [{row[f'{k}_low']:.3f}, {row[f'{k}_high']:.3f}]" for k in ("null", "harness"))
        print(f"{name:12s}{row['ms']:<16.2f}{null:24s}{ours}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
