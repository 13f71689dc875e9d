"""Adapters weighed: a GPT that has read Python reads prose, every method with about as many parameters that train.

    python benchmarks/adapters.py base                      trains the GPT on Python, minutes
    python benchmarks/adapters.py run [--trials 4] [--page docs/results]
    python benchmarks/adapters.py page --page docs/results  the page, of adapters.json there

The comparison is that of `poise compare`, with equal tuning and paired seeds; stopped, it goes on where it was.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from text_domains import Text

from poise import catalog
from poise.cli import main as poise
from poise.compare import Results
from poise.compare.digits import spread
from poise.compare.entries import entry_of, parse
from poise.compare.fit import Fit, fit
from poise.compare.results import write_whole

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "adapters"
TASK = Path(__file__).with_name("adapter_tasks") / "python_to_prose.py"
# About 78 thousand parameters each, as LoRA of rank 8 beside all hidden layers has; and LoRA-SB with a fortieth of them.
METHODS = (
    "adamw",
    "lora(rank=8)",
    "rslora=lora(rank=8,rank_stabilized=True)",
    "dora(rank=8)",
    "altlora=lora(rank=8,around=altlora,alpha=8.0)",
    "altlora-plus=lora(rank=8,around=altlora-plus,alpha=8.0)",
    "lora-muon=lora(rank=8,around=muon)",
    "lora-sb(rank=52)",
    "lora-sb-small=lora-sb(rank=8)",
    "goat(rank=6,experts=3,top_k=2)",
    "compacter(reduction=2,rank=24)",
    "lora-ggpo(rank=8)",
    "queryable-lora(rank=8)",
    "kappatune(layers=11,rank=16)",
    "diffora(rank=10,keep=0.5,steps=20)",
    "pair-customization(content_rank=7,style_rank=7,targets=linear)",
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["base", "run", "page"])
    parser.add_argument("--base-steps", type=int, default=1200, metavar="N", help="on Python; %(default)s")
    parser.add_argument("--trials", type=int, default=4, metavar="N", help="of each method; %(default)s")
    parser.add_argument("--tune-steps", type=int, default=50, metavar="N", help="%(default)s")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="%(default)s")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="%(default)s")
    parser.add_argument("--workers", type=int, default=2, metavar="N")
    parser.add_argument("--page", type=Path, metavar="DIR", help="where adapters.json and adapters.md are kept")
    args = parser.parse_args(argv)
    if args.what == "base":
        entry = entry_of(catalog.get("adamw"), {"lr": 4e-3, "weight_decay": 0.1})
        found = fit(Fit(Text(("python",)), entry, 0, args.base_steps, RUNS / "base"))
        print(f"{found.loss:.4f} nats per byte of Python after {found.passes} steps")
        return 0
    if args.what == "run":
        weigh(args)
        if args.page is not None:
            shutil.copyfile(RUNS / "study" / "results.json", args.page / "adapters.json")
    if args.page is not None:
        results = Results.read(args.page / "adapters.json")
        write_whole(args.page / "adapters.md", page(results))
    return 0


def weigh(args: argparse.Namespace) -> None:
    numbers = {"trials": args.trials, "tune-steps": args.tune_steps, "steps": args.steps, "seeds": args.seeds}
    flags = [text for name, value in numbers.items() for text in (f"--{name}", str(value))]
    out = ["--out", str(RUNS / "study"), "--workers", str(args.workers), "--budgets", ""]
    try:
        poise(["compare", str(TASK), "--methods", ",".join(METHODS), *flags, *out])
    except SystemExit as ended:
        if ended.code not in (0, None):
            raise


def page(results: Results) -> str:
    """The table, best first."""
    s = results.settings
    lines = [
        f"| method | trains | loss | minus {results.reference} | state, bytes | step | chosen | diverged |",
        "|---|---:|---:|---:|---:|---:|---|---:|",
    ]
    for found in sorted(results.methods, key=lambda one: one.final.mean if one.final else float("inf")):
        runs = found.finals or found.trials
        hyper = found.trials[found.best].hyper if found.best is not None else {}
        chosen = ", ".join(
            f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in hyper.items()
        )
        lead = "**" if found.name in results.verdict.leaders else ""
        minus = "" if found.name == results.reference else spread(found.to_reference, sign="+")
        ratio = f"{found.timing.ratio:.2f}×" if found.timing is not None else ""
        lines.append(
            f"| {lead}{found.name}{lead} | {runs[0].trained:,} | {spread(found.final)} | {minus} |"
            f" {median(run.state_bytes for run in runs):,.0f} | {ratio} | {chosen} |"
            f" {found.divergences} of {len(found.trials) + len(found.finals)} |"
        )
    whole = results.methods[0].finals[0].parameters
    listed = "\n".join(f"- `{method}`" for method in METHODS)
    return f"""# Adapters, weighed

A GPT of {whole:,} parameters that had read Python read prose for {s.steps} passes; what stands beside its layers trained, and
nothing else, but `adamw` trains all of it. {s.trials} tuning trials of {s.tune_steps} passes for each method, then {s.seeds}
paired seeds; losses are nats per byte on text that chose nothing, with 95 % intervals. `step` is the time of a training step
beside that of full fine-tuning. Passes in which a method looks at gradients first are charged to it. Small model, short
training: what holds here may not hold at a billion parameters.

{chr(10).join(lines)}

{results.verdict.sentence}

What was entered:

{listed}

Made by `python benchmarks/adapters.py page --page docs/results` of `adapters.json`, which its `run` writes.
"""


def known() -> set[str]:
    """Names of the adapters that are weighed."""
    return {entry.method.name for entry in parse(",".join(METHODS)).values()}


if __name__ == "__main__":
    raise SystemExit(main())
