"""Is the scale true? AdamW against itself, and against a tenth of its learning rate, on several tasks and study seeds.

    python benchmarks/scale.py [--tasks digits,convex,code-lm] [--studies 10] [--steps 100] [--out runs/scale] [--json]

again   AdamW under another name, with the same draws: must tie, at a speed-up of 1.
twin    AdamW tuned by draws of its own, as a rival would be: how often does luck in tuning win? One in twenty is what a 95 %
        interval promises.
slow    AdamW with the settings just tuned, but a tenth of the learning rate: must be called worse.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from poise import catalog
from poise.compare import Entry, Journal, Settings, compare, tasks
from poise.compare.results import MethodResult
from poise.compare.statistics import may_be_luck
from poise.compare.workers import Pool


def study(task: tasks.Task, settings: Settings, journal: Journal, workers: int) -> dict[str, MethodResult]:
    """One comparison of the four."""
    adamw = catalog.get("adamw")
    entries = {"adamw": Entry(adamw), "again": Entry(adamw), "twin": Entry(replace(adamw, name="twin"))}
    with Pool(task, entries, workers) as pool:
        first = compare(task, entries, settings, journal, workers=pool, timing=False)
    best = first.methods[0]
    assert best.best is not None
    hyper = best.trials[best.best].hyper
    entries = {"adamw": Entry(adamw), "slow": Entry(adamw, {**hyper, "lr": hyper["lr"] / 10})}
    with Pool(task, entries, workers) as pool:
        second = compare(task, entries, settings, journal, workers=pool, timing=False)
    return {found.name: found for found in [*first.methods, *second.methods]}


def judge(found: dict[str, MethodResult]) -> dict[str, Any]:
    """What one study says of each."""
    said: dict[str, Any] = {}
    for name in ("again", "twin", "slow"):
        difference, gain = found[name].to_reference, found[name].speedup
        tie = may_be_luck(difference, found[name].tuning_gap, found["adamw"].tuning_gap)
        said[name] = {
            "difference": None if difference is None else difference.mean,
            "half": None if difference is None or difference.high is None else difference.high - difference.mean,
            "tie": tie,
            "tie_by_seeds_alone": may_be_luck(difference),
            "worse": not tie and difference is not None and difference.mean > 0,
            "speedup": None if gain is None else gain.ratio,
            "bound": None if gain is None else gain.bound,
        }
    return said


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="AdamW against itself.")
    parser.add_argument("--tasks", default="digits,convex,code-lm")
    parser.add_argument("--studies", type=int, default=10)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/scale"))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    said: dict[str, list[dict[str, Any]]] = {}
    for name in args.tasks.split(","):
        task = tasks.load(name)
        for seed in range(args.studies):
            steps = {"tune_steps": args.steps, "steps": args.steps}
            settings = Settings.model_validate({"trials": args.trials, **steps, "seeds": args.seeds, "seed": seed})
            journal = Journal(args.out / f"{name}-{seed}.db")
            said.setdefault(name, []).append(judge(study(task, settings, journal, args.workers)))
            print(f"{name}, study {seed}: {json.dumps(said[name][-1])}", file=sys.stderr)
    every = [one for studies in said.values() for one in studies]
    whole = {
        "again_ties": sum(one["again"]["tie"] for one in every),
        "twin_ties": sum(one["twin"]["tie"] for one in every),
        "twin_ties_by_seeds_alone": sum(one["twin"]["tie_by_seeds_alone"] for one in every),
        "slow_called_worse": sum(one["slow"]["worse"] for one in every),
        "of": len(every),
        "again_speedup": fmean(one["again"]["speedup"] for one in every),
        "twin_speedup": fmean(one["twin"]["speedup"] for one in every),
        "tasks": said,
    }
    print(json.dumps(whole, indent=1) if args.json else "\n".join(f"{key:20s}{whole[key]}" for key in list(whole)[:-1]))
    return 0 if whole["again_ties"] == whole["slow_called_worse"] == len(every) else 1


if __name__ == "__main__":
    sys.exit(main())
