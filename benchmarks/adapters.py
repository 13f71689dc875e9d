"""Adapters weighed: a GPT that has read Python reads prose, and MiniLM tells meanings apart, every method with about as many
parameters that train.

    python benchmarks/adapters.py base                           trains the GPT on Python, minutes
    python benchmarks/adapters.py run [--studies minilm_glosses] half an hour and an hour; goes on where it stopped
    python benchmarks/adapters.py forget                         what is forgotten of Python, a quarter of an hour
    python benchmarks/adapters.py page                           docs/results/adapters.md, of the JSON files beside it

The comparison is that of `poise compare`, with equal tuning and paired seeds. glosses.py says what MiniLM's needs; the
page's figures need a Chromium.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from adapting.forgetting import measure, read
from adapting.page import called, page
from adapting.studies import PROSE, STUDIES, Study
from league import figures
from text_domains import Text

from poise import catalog
from poise.cli import main as poise
from poise.compare import Results
from poise.compare.entries import entry_of
from poise.compare.fit import Fit, fit
from poise.compare.results import write_whole

ROOT = Path(__file__).resolve().parents[1]
FORGETTING_SEEDS = 3
RUNS, DOCS = ROOT / "runs" / "adapters", ROOT / "docs" / "results"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["base", "run", "forget", "page"])
    parser.add_argument("--base-steps", type=int, default=1200, metavar="N", help="on Python; %(default)s")
    parser.add_argument("--studies", default=",".join(STUDIES), help="of %(default)s")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="runs at once; %(default)s")
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="DIR", help="where JSON files and the page are kept")
    args = parser.parse_args(argv)
    studies = args.studies.split(",")
    if strange := set(studies) - set(STUDIES):
        parser.error(f"--studies: unknown {', '.join(sorted(strange))}; known: {', '.join(STUDIES)}")
    if args.what == "base":
        entry = entry_of(catalog.get("adamw"), {"lr": 4e-3, "weight_decay": 0.1})
        found = fit(Fit(Text(("python",)), entry, 0, args.base_steps, RUNS / "base"))
        print(f"{found.loss:.4f} nats per byte of Python after {found.passes} steps")
        return 0
    if args.what == "run":
        for name in studies:
            weigh(STUDIES[name], args.workers)
            args.docs.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(RUNS / name / "results.json", file(args.docs, name))
    forgetting = args.docs / "adapters-forgetting.json"
    if args.what == "forget":
        prose = Results.read(file(args.docs, PROSE.task))
        measure(prose, RUNS / "base" / "model", FORGETTING_SEEDS, forgetting, args.workers)
    found = {name: Results.read(file(args.docs, name)) for name in STUDIES if file(args.docs, name).exists()}
    for name, text in figures.draw({called(name): figures.differences(results) for name, results in found.items()}).items():
        write_whole(args.docs / f"{name}.svg", text)
    write_whole(args.docs / "adapters.md", page(found, read(forgetting)))
    return 0


def file(docs: Path, study: str) -> Path:
    return docs / f"{called(study)}.json"


def weigh(study: Study, workers: int) -> None:
    """One comparison; SystemExit with poise's own code if it fails or is interrupted."""
    try:
        poise([*study.command(), "--out", str(RUNS / study.task), "--workers", str(workers)])
    except SystemExit as ended:
        if ended.code not in (0, None):
            raise


if __name__ == "__main__":
    raise SystemExit(main())
