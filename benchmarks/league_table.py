"""The league table: every optimizer of the catalog weighed on small tasks, and a page made of what came out.

python benchmarks/league_table.py run [--workers 2] [--tasks digits]     hours; stopped, it goes on where it was
python benchmarks/league_table.py time                                    seconds measured anew, losses left as they are
python benchmarks/league_table.py page                                    docs/results from the JSON files in it
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from league import entries, figures, page

from poise.cli import main as poise
from poise.compare import Results
from poise.compare.entries import parse
from poise.compare.results import write_whole
from poise.compare.study import SEEDS_APART
from poise.compare.tasks import load
from poise.compare.timing import time_steps

ROOT = Path(__file__).resolve().parents[1]
RUNS, DOCS = ROOT / "runs" / "league", ROOT / "docs" / "results"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "time", "page"])
    parser.add_argument("--tasks", default=",".join(entries.TASKS), help="of %(default)s")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="runs at once; %(default)s")
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="DIR", help="where JSON files and the page are kept")
    args = parser.parse_args(argv)
    tasks = args.tasks.split(",")
    if strange := set(tasks) - set(entries.TASKS):
        parser.error(f"--tasks: unknown {', '.join(sorted(strange))}; known: {', '.join(entries.TASKS)}")
    if args.what == "run":
        for task in tasks:
            weigh(task, args.workers)
            args.docs.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(RUNS / task / "results.json", args.docs / f"{task}.json")
    if args.what == "time":
        for task in tasks:
            file = args.docs / f"{task}.json"
            timed(Results.read(file)).write(file)
    make(args.docs)
    return 0


def weigh(task: str, workers: int) -> None:
    """One task's comparison; SystemExit with poise's own code if it fails or is interrupted."""
    try:
        poise([*entries.command(task), "--out", str(RUNS / task), "--workers", str(workers)])
    except SystemExit as end:
        if end.code:
            raise


def timed(results: Results) -> Results:
    """The same comparison with seconds as they are on this machine, by this code: a faster step needs no hours of training."""
    weighed = {found.name: found for found in results.methods}
    chosen = {name: found.trials[found.best].hyper for name, found in weighed.items() if found.best is not None}
    known = parse(",".join(name for name in entries.names() if entries.called(name) in chosen))
    task, seed = load(results.task), results.settings.seed * SEEDS_APART
    seconds = time_steps(task, known, chosen, results.reference, seed=seed, device=results.settings.device)
    methods = [found.model_copy(update={"timing": seconds.get(found.name)}) for found in results.methods]
    return results.model_copy(update={"methods": methods})


def make(docs: Path) -> None:
    """The page and its figures, of the tasks whose JSON is there."""
    found = {task: Results.read(docs / f"{task}.json") for task in entries.TASKS if (docs / f"{task}.json").exists()}
    if not found:
        sys.exit(f"no results in {docs}: run `python benchmarks/league_table.py run` first")
    drawn = {f"{task}-loss": figures.differences(results) for task, results in found.items()}
    drawn |= {f"{task}-speed": figures.speedups(results) for task, results in found.items()}
    for name, text in figures.draw(drawn).items():
        write_whole(docs / f"{name}.svg", text)
    write_whole(docs / "index.md", page.render(found))


if __name__ == "__main__":
    sys.exit(main())
