"""Seconds of a training step, measured apart from the runs: the methods take turns in one process, and nothing else runs.

Inside parallel trials a second says how busy the machine was. Taking turns spreads what disturbs it over all methods alike, and
ratios within a round compare moments that lie next to each other.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import median, quantiles
from typing import Any

import torch

from poise.compare import randomness
from poise.compare.entries import Entry
from poise.compare.loop import Loop
from poise.compare.results import Timing
from poise.compare.tasks import Task

BLOCK = 10  # steps in a turn: rare work, such as a new basis every ten steps, is in its mean
ROUNDS = 12
ENOUGH = 20.0  # seconds after which no further round begins, once there are LEAST
LEAST = 3


def time_steps(
    task: Task,
    entries: Mapping[str, Entry],
    hyper: Mapping[str, Mapping[str, Any]],
    reference: str,
    *,
    seed: int,
    device: str = "cpu",
) -> dict[str, Timing]:
    """Seconds per step of every entry that `hyper` has settings for, and their ratios to the reference's in the same round."""
    names = [name for name in entries if name in hyper]
    if not names:
        return {}
    total: dict[str, list[float]] = {name: [] for name in names}
    own: dict[str, list[float]] = {name: [] for name in names}
    with randomness.own(seed, device):
        loops = {name: begin(task, entries[name], hyper[name], seed, device) for name in names}
        for loop in loops.values():
            block(loop)  # compiles, and brings caches into the state of a run
        started = time.perf_counter()
        for number in range(ROUNDS):
            if number >= LEAST and time.perf_counter() - started > ENOUGH:
                break
            for name in names[number % len(names) :] + names[: number % len(names)]:
                seconds, inside = block(loops[name])
                total[name].append(seconds)
                own[name].append(seconds - inside)
    beside = total.get(reference, total[names[0]])
    found = {}
    for name in names:
        ratios = [ours / theirs for ours, theirs in zip(total[name], beside, strict=True)]
        low, _, high = quantiles(ratios, n=4)
        found[name] = Timing(
            seconds_per_step=median(total[name]),
            optimizer_seconds_per_step=median(own[name]),
            ratio=median(ratios),
            low=low,
            high=high,
            rounds=len(ratios),
        )
    return found


def begin(task: Task, entry: Entry, hyper: Mapping[str, Any], seed: int, device: str) -> Loop:
    passes = 4 * BLOCK * (ROUNDS + 1)  # a schedule that does not end under the clock, whatever passes a step takes
    return Loop(task, lambda model: entry.build(model, task, **hyper), seed=seed, passes=passes, device=device)


def block(loop: Loop) -> tuple[float, float]:
    """Mean seconds of a step over a few of them, and those inside its passes."""
    inside = 0.0
    started = time.perf_counter()
    for _ in range(BLOCK):
        loop.step()
        inside += loop.inside
    if loop.device != "cpu":
        torch.accelerator.synchronize()
    return (time.perf_counter() - started) / BLOCK, inside / BLOCK
