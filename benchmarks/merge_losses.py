"""Four fine-tunings of one small GPT, one for each kind of text, merged by every method: losses of each kind, and a page.

    python benchmarks/merge_losses.py [--steps 600] [--page docs/results] [--json]

Parents are trained once and kept in runs/merging; a run that is stopped goes on. Every method has the same number of trials,
judged on the split `tune`; what is said is the split `report`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from text_domains import BATCH, CONFIG, CONTEXT, DOMAINS, Text, loaded, losses, read
from torch import Tensor, nn

from poise import catalog
from poise.compare import provenance
from poise.compare.entries import entry_of
from poise.compare.fit import Fit, fit, restore
from poise.compare.loop import Loop
from poise.compare.results import write_whole
from poise.compare.sampler import draw
from poise.merge import merge
from poise.merge.methods.concrete import ConcreteMerging, Form
from poise.merge.methods.fusion_study import fusion_study
from poise.merge.methods.optimised_linear import optimise_linear
from poise.merge.methods.warp_training import WarpTraining
from poise.merge.moments import save_second_moments
from poise.optim import AdamW

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "merging"
BASE_LR, TUNE_LR = 4e-3, 1e-3
MOMENTS = "second_moments.safetensors"
Weights = Mapping[str, Tensor]


@dataclass
class Line:
    """One model: what it is, what was chosen for it, and its loss on each domain."""

    name: str
    kind: str  # "reference", "merge" or "learned"
    chosen: dict[str, Any]
    losses: dict[str, float]
    seconds: float | None = None
    logits: float | None = None  # largest difference to transformers, of the folder that was written

    @property
    def mean(self) -> float:
        return fmean(self.losses.values())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, metavar="N", help="of each fine-tuning; the start has thrice as many")
    parser.add_argument("--trials", type=int, default=8, metavar="N", help="settings that are tried for each method")
    parser.add_argument("--learn", type=int, default=200, metavar="N", help="steps of methods that learn a mask")
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="where trained models are kept")
    parser.add_argument("--page", type=Path, metavar="DIR", help="also write merging.json and merging.md there")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    args = parser.parse_args(argv)
    whole = study(args.runs, args.steps, args.trials, args.learn)
    if args.page is not None:
        write_whole(args.page / "merging.json", json.dumps(whole, indent=1) + "\n")
        write_whole(args.page / "merging.md", page(whole))
    print(json.dumps(whole, indent=1) if args.json else "\n".join(table(whole["lines"])))
    return 0


def study(runs: Path, steps: int, trials: int, learn: int) -> dict[str, Any]:
    base = train(runs / "base", DOMAINS, None, 3 * steps, BASE_LR)
    parents = {name: train(runs / name, (name,), base, steps, TUNE_LR) for name in DOMAINS}
    joint = train(runs / "joint", DOMAINS, base, len(DOMAINS) * steps, TUNE_LR)
    lines = [Line("start", "reference", {}, losses(state(base), "report"))]
    lines += [
        Line(f"fine-tuned on {name}", "reference", {}, losses(state(folder), "report")) for name, folder in parents.items()
    ]
    lines.append(Line("joint training", "reference", {}, losses(state(joint), "report")))
    folders = list(parents.values())
    for name, make, space in merges(folders, base):
        lines.append(weighed(name, make, space, trials, runs / "merged" / name.replace(" ", "-")))
    lines += learned(folders, base, steps, learn, runs)
    report = fusion_study(
        state(base),
        state(parents["python"]),
        state(parents["prose"]),
        lambda weights: fmean(losses(weights, "report")[name] for name in ("python", "prose")),
        names=("python", "prose"),
    )
    return {
        "settings": {"steps": steps, "trials": trials, "learn": learn, "batch": BATCH, "context": CONTEXT},
        "model": {**asdict(CONFIG), "parameters": sum(p.numel() for p in loaded(state(base)).parameters())},
        "environment": provenance.environment(),
        "lines": [asdict(line) for line in lines],
        "fusion_study": [asdict(row) for row in report.rows],
    }


def train(folder: Path, domains: Sequence[str], start: Path | None, steps: int, lr: float) -> Path:
    """The folder of a model fine-tuned as `poise train` does, and Adam's second moments in it."""
    task = Text(domains, start)
    run = Fit(task, entry_of(catalog.get("adamw"), {"lr": lr, "weight_decay": 0.1}), 0, steps, folder)
    if not (folder / "model" / MOMENTS).exists():
        print(f"{folder.name}: {steps} steps on {', '.join(domains)}", flush=True)
        fit(run)
        loop = Loop(task, run.entry.build, seed=0, passes=steps)
        restore(run, loop)
        save_second_moments(loop.optimizer, loop.model, folder / MOMENTS)
    return folder / "model"


def state(folder: Path) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in read(folder).state_dict().items()}


Make = Callable[[dict[str, Any], Path | None], Any]


def merges(folders: Sequence[Path], base: Path) -> Iterator[tuple[str, Make, str | None]]:
    """A name, how the merge is made from settings, and the method whose space the settings are drawn from."""

    def of(method: str, **fixed: Any) -> Make:
        rooted = None if method == "linear" else base
        return lambda hyper, out: merge(folders, method, rooted, out=out, **fixed, **hyper)

    def two_by_two(method: str, rooted: Path | None, inner: Mapping[str, Any]) -> Make:
        def make(hyper: dict[str, Any], out: Path | None) -> Any:
            if out is None:
                return merge([merge(folders[i : i + 2], method, rooted, **inner) for i in (0, 2)], method, rooted, **hyper)
            pairs = [merge(folders[i : i + 2], method, rooted, out=f"{out}-{i}", **inner).out for i in (0, 2)]
            return merge(pairs, method, rooted, out=out, **hyper)

        return make

    beside = tuple(folder.parent / MOMENTS for folder in folders)
    yield "linear", of("linear"), None
    yield "task arithmetic", of("task_arithmetic"), "task_arithmetic"
    yield "slerp, two by two", two_by_two("slerp", None, {"t": 0.5}), "slerp"
    yield "dare, linear", of("dare_linear"), "dare_linear"
    yield "dare, ties", of("dare_ties"), "dare_ties"
    yield "ties", of("ties"), "ties"
    yield "ota", of("ota", moments=beside), "ota"
    yield "ota, rank one", of("ota", moments=beside, compress="rank1"), "ota"
    yield "warp", of("warp"), "warp"
    yield "delta space, two by two", two_by_two("delta_space", base, {"a": 1.0, "b": 1.0}), "delta_space"


def weighed(name: str, make: Make, space: str | None, trials: int, out: Path) -> Line:
    """The best of so many settings by the split `tune`, on the split `report`; written, and read by transformers."""
    drawn = [draw(catalog.get(space), 0, number) for number in range(trials)] if space is not None else [{}]
    tried = [(fmean(losses(make(hyper, None), "tune").values()), number) for number, hyper in enumerate(drawn)]
    hyper = drawn[min(tried)[1]]
    began = time.perf_counter()
    merged = make(hyper, None)
    seconds = time.perf_counter() - began
    written = make(hyper, out)
    assert not written.broken, written.broken
    line = Line(name, "merge", hyper, losses(merged, "report"), seconds, by_transformers(merged, out))
    print(f"{name}: {line.mean:.4f} {hyper}", flush=True)
    return line


@torch.no_grad()
def by_transformers(weights: Weights, folder: Path) -> float:
    """The largest difference of logits between transformers' model of the folder and ours of the weights."""
    from transformers import AutoModelForCausalLM

    theirs: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokens = next(Text(DOMAINS).batches("report", 0))[:, :-1]
    return float((theirs(tokens).logits - loaded(weights)(tokens)).abs().max())


def learned(folders: Sequence[Path], base: Path, steps: int, learn: int, runs: Path) -> Iterator[Line]:
    """The methods that need more than weights."""
    models, root = [state(folder) for folder in folders], state(base)

    def line(name: str, chosen: dict[str, Any], weights: Weights, began: float) -> Line:
        seconds = time.perf_counter() - began
        folder = runs / "merged" / name.replace(" ", "-")
        loaded(weights).save_pretrained(folder)
        found = Line(name, "learned", chosen, losses(weights, "report"), seconds, by_transformers(weights, folder))
        print(f"{name}: {found.mean:.4f} {chosen}", flush=True)
        return found

    began = time.perf_counter()
    found = optimise_linear(models, lambda soup: {k: -v for k, v in losses(dict(soup), "tune").items()}, budget=60)
    weights = merge(models, "linear", weight=found.best.alpha)
    yield line("optimised linear", {"weights": [round(a, 4) for a in found.best.alpha], "budget": 60}, weights, began)
    forms: tuple[Form, ...] = ("task_arithmetic", "adamerging")
    for form in forms:
        began = time.perf_counter()
        best: tuple[float, float, dict[str, Tensor]] | None = None
        for coefficient in (0.2, 0.3, 0.5):
            merging = ConcreteMerging(loaded(root), root, models, read_logits, form=form, coefficient=coefficient, lr=1e-2)
            merging.fit(batches(), learn // 2)
            mask = merging.freeze(batches(), learn // 2) if form == "adamerging" else None
            weights = merging.result(merging.final_mask("mean") if mask is None else mask)
            score = fmean(losses(weights, "tune").values())
            if best is None or score < best[0]:
                best = score, coefficient, weights
        assert best is not None
        yield line(f"concrete, {form.replace('_', ' ')}", {"coefficient": best[1], "steps": learn}, best[2], began)
    began = time.perf_counter()
    training = WarpTraining(loaded(root), anchored, lambda p: AdamW(p, lr=TUNE_LR, weight_decay=0.1), eta=0.3)
    for number in range(2):
        training.round([itertools.islice(Text((name,)).batches("train", number), steps // 2) for name in DOMAINS])
    eta, weights = min(training.front([0.25, 0.5, 0.75, 1.0]), key=lambda found: fmean(losses(found[1], "tune").values()))
    yield line("warp training", {"rounds": 2, "eta": eta}, weights, began)


def batches() -> Iterator[list[Tensor]]:
    """Inputs of every domain; of targets nothing is seen."""
    streams = [Text((name,)).batches("train", 7) for name in DOMAINS]
    return ([next(stream)[:8, :-1] for stream in streams] for _ in itertools.count())


def read_logits(net: Callable[..., Tensor], task: int, batch: Tensor) -> Tensor:
    return net(batch)


def anchored(policy: nn.Module, anchor: nn.Module, batch: Tensor, beta: float = 0.1) -> Tensor:
    """WARP's loss with likelihood for a reward: what is gained on the text, less the distance to the anchor."""
    logits = policy(batch[:, :-1]).log_softmax(-1)
    with torch.no_grad():
        old = anchor(batch[:, :-1]).log_softmax(-1)
    distance = (logits.exp() * (logits - old)).sum(-1).mean()
    return -logits.gather(-1, batch[:, 1:, None]).mean() + beta * distance


def table(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [
        "| model | " + " | ".join(DOMAINS) + " | mean | chosen | seconds | logits |",
        "|---|" + "---:|" * 5 + "---|---:|---:|",
    ]
    best = min(fmean(line["losses"].values()) for line in lines if line["kind"] != "reference")
    for line in lines:
        mean = fmean(line["losses"].values())
        said = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in line["chosen"].items())
        bold = "**" if mean == best else ""
        seconds = f"{line['seconds']:.2f}" if line["seconds"] is not None else ""
        logits = f"{line['logits']:.0e}" if line["logits"] is not None else ""
        numbers = " | ".join(f"{line['losses'][name]:.3f}" for name in DOMAINS)
        rows.append(f"| {line['name']} | {numbers} | {bold}{mean:.4f}{bold} | {said} | {seconds} | {logits} |")
    return rows


def page(whole: Mapping[str, Any]) -> str:
    settings, model = whole["settings"], whole["model"]
    study = [
        f"| {row['name']} | {row['coefficient'] if row['coefficient'] is not None else ''} | {row['score']:.4f} |"
        for row in whole["fusion_study"]
    ]
    return f"""# Merges, weighed

A GPT of {model["parameters"]:,} parameters ({model["num_hidden_layers"]} layers, width {model["hidden_size"]}, bytes) read
four kinds of text for {3 * settings["steps"]} steps, and was then fine-tuned on each of them for {settings["steps"]} steps
with AdamW. Every method merged those four. Losses are nats per byte on text that neither training nor tuning saw; every method
had {settings["trials"]} settings of its own range to choose from, by another held-out text: that of TIES's lambda begins at
0.8, as its authors search it. One training run: differences of some thousandths are not to be trusted. Joint training took as
many steps as the four fine-tunings together.

`logits` is the largest difference between what transformers computes from the written folder and what poise's own model does
from the merged tensors. `seconds` is of one merge, or of all that was learned.

{chr(10).join(table(whole["lines"]))}

`slerp` and `delta space` take two models, and merged two pairs and then what came of them. Concrete subspace learning saw
inputs alone. WARP's training loop trained anew, with likelihood for a reward, as many steps as the fine-tunings.

## Two parents and their fusions

The mean loss on python and prose; the coefficient is the share of prose.

| model | coefficient | loss |
|---|---:|---:|
{chr(10).join(study)}

Made by `python benchmarks/merge_losses.py --page docs/results`; the numbers are in `merging.json`.
"""


if __name__ == "__main__":
    raise SystemExit(main())
