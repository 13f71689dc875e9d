"""What inexact orthogonalization costs Muon: its steps x learning rate x momentum, swept on a small task.

    python benchmarks/inexact_muon.py [--task digits] [--method polar_express] [--steps 1,2,3,5] [--lrs 0.01,0.02,...] [--json]

"Beyond the Ideal: Analyzing the Inexact Muon Update" (arXiv 2510.19933) predicts that with a larger error delta the best
learning rate falls and the best momentum rises. This reports what the sweep finds, and asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from torch import nn

from poise.compare import randomness, tasks
from poise.compare.loop import Loop
from poise.linalg.polar import check_options
from poise.optim import Muon
from poise.optim.orthogonality import Errors, log_orthogonality


def run(task: tasks.Task, *, passes: int, seed: int, every: int, **hyper: Any) -> tuple[float, list[float]]:
    """The final loss, nan if it diverged, and every so many steps the mean over all matrices of the Frobenius error.

    Not the spectral one: gradients of real data have directions that are nearly zero, which no few steps bring to length 1, so
    that it stands near 1 whatever the method.
    """
    deltas: list[float] = []

    def log(step: int, errors: Errors) -> None:
        deltas.append(fmean(float(error.frobenius.mean()) for error in errors.values()))

    def build(model: nn.Module) -> Muon:
        opt = Muon(model, backend="eager", **hyper)
        log_orthogonality(opt, every, log)
        return opt

    with randomness.own(seed):
        loop = Loop(task, build, seed=seed, passes=passes)
        while not loop.finished and not loop.hopeless:
            loop.step()
        return loop.evaluate("tune"), deltas


def sweep(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each setting, over the seeds."""
    task = tasks.load(args.task)
    rows = []
    for steps in args.steps:
        for momentum in args.momenta:
            for lr in args.lrs:
                hyper = {"method": args.method, "steps": steps, "momentum": momentum, "lr": lr}
                runs = [run(task, passes=args.passes, seed=seed, every=args.every, **hyper) for seed in range(args.seeds)]
                loss = fmean(loss for loss, _ in runs)
                deltas = [delta for _, found in runs for delta in found]
                rows.append(
                    {**hyper, "loss": loss if math.isfinite(loss) else None, "delta": median(deltas) if deltas else None}
                )
                print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """For each number of steps its delta and the best setting of the others."""
    lines = [f"{'steps':>5} {'delta':>7} {'best lr':>8} {'momentum':>9} {'loss':>8}"]
    for steps in dict.fromkeys(row["steps"] for row in rows):
        own = [row for row in rows if row["steps"] == steps]
        deltas = [row["delta"] for row in own if row["delta"] is not None]
        delta = f"{median(deltas):.3f}" if deltas else ""
        finished = [row for row in own if row["loss"] is not None]
        if finished:
            best = min(finished, key=lambda row: row["loss"])
            lines.append(f"{steps:>5} {delta:>7} {best['lr']:>8.3g} {best['momentum']:>9.3g} {best['loss']:>8.4f}")
        else:
            lines.append(f"{steps:>5} {delta:>7} {'diverged':>27}")
    return "\n".join(lines)


def numbers(kind: type) -> Any:
    return lambda text: [kind(part) for part in text.split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Muon's steps, learning rate and momentum.")
    parser.add_argument("--task", default="digits")
    parser.add_argument("--method", default="polar_express")
    parser.add_argument("--steps", type=numbers(int), default=[1, 2, 3, 5])
    parser.add_argument("--lrs", type=numbers(float), default=[0.005, 0.01, 0.02, 0.04, 0.08])
    parser.add_argument("--momenta", type=numbers(float), default=[0.8, 0.9, 0.95, 0.98])
    parser.add_argument("--passes", type=int, default=100)
    parser.add_argument("--every", type=int, default=25, help="steps between two looks at delta")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    for steps in args.steps:
        check_options(args.method, steps, "auto", None)
    rows = sweep(args)
    print(json.dumps(rows, indent=1) if args.json else table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
