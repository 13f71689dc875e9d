"""The page of weighed adapters: a table for each study, then what became of the published claims."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

from league.judging import between
from league.page import CLAIMS_HEAD, judged

from poise.compare.digits import spread
from poise.compare.results import MethodResult, Results
from poise.compare.statistics import interval

from .claims import claims
from .forgetting import Losses, forgotten
from .studies import PROSE, STUDIES

HEAD = """\
# Adapters, weighed

Every adapter of the catalog under one budget, beside full fine-tuning (`adamw`, which trains all of the model) and LoRA. The
tables say what these methods do *at this scale, tuned this much*, and nothing about a billion parameters.

{budgets}

How it is done is told in [Comparing fairly](../comparing.md). Each has about as many parameters that train, but for
`lora-sb-small`; passes in which a method looks at gradients first are charged to it. Loss is on held-out data, with 95 %
intervals over seeds; state is of the optimizer. `step` is the time of a training step beside that of full fine-tuning. Names
in bold cannot be told from the best.{forgotten}

Made by `python benchmarks/adapters.py page` from the JSON files beside it, which its `base`, `run` and `forget` write.
"""


FORGOTTEN = """
`forgotten` is how much the loss on held-out Python rose, in the first {seeds} of the seeds."""


def page(found: Mapping[str, Results], losses: Losses) -> str:
    """In Markdown. `losses` are those on Python of the models that have read prose since; empty where they are not known."""
    budgets = "\n".join(f"- {budget(results)}" for results in found.values())
    parts = [HEAD.format(budgets=budgets, forgotten=FORGOTTEN.format(seeds=len(losses["lora"])) if losses else "")]
    parts += [section(results, losses if results.task == PROSE.task else {}) for results in found.values()]
    return "\n".join([*parts, "## What papers say, and what was seen\n", CLAIMS_HEAD, judged(found, claims(losses))])


def budget(results: Results) -> str:
    """One line on what was done, and how often."""
    s, whole = results.settings, results.methods[0].finals[0].parameters
    return (
        f"**{results.task}**: {STUDIES[results.task].about} ({whole:,} parameters). {s.trials} tuning trials of {s.tune_steps} "
        f"passes, then {s.seeds} paired seeds of {s.steps} passes. On {results.environment.get('cpus')} cores with torch "
        f"{results.environment.get('torch')}, one thread a run."
    )


def section(results: Results, losses: Losses) -> str:
    """A study: verdict and table, best first; with what was forgotten, where that is known."""
    head = ["", "trains", f"final loss, {results.unit}", f"minus {results.reference}", "minus lora", "state, kB", "step, ms"]
    head += ["step", "chosen", "diverged"]
    ordered = sorted(results.methods, key=lambda one: one.final.mean if one.final else float("inf"))
    if losses:
        head.insert(5, "forgotten")
    rows = [f"| {' | '.join(cells(results, one, losses))} |" for one in ordered]
    entered = "\n".join(f"- `{method}`" for method in STUDIES[results.task].methods)
    return "\n".join(
        [
            f"## {results.task}\n",
            f"Verdict: {results.verdict.sentence}.\n",
            f"![Final loss of every method minus full fine-tuning's]({called(results.task)}.svg)\n",
            f"| {' | '.join(head)} |",
            f"|---|{'---:|' * (len(head) - 3)}---|---:|",
            *rows,
            f"\nEvery run, every trial: [report]({called(results.task)}-report.html). What was entered:\n\n{entered}\n",
        ]
    )


def called(study: str) -> str:
    """The name that its files have, before what they are."""
    return f"adapters-{study.replace('_', '-')}"


def cells(results: Results, one: MethodResult, losses: Losses) -> list[str]:
    runs = one.finals or one.trials
    hyper = one.trials[one.best].hyper if one.best is not None else {}
    timing = one.timing
    return [
        f"**{one.name}**" if one.name in results.verdict.leaders else one.name,
        f"{runs[0].trained:,}",
        spread(one.final),
        "" if one.name == results.reference else minus(results, one.name, results.reference),
        "" if one.name == "lora" else minus(results, one.name, "lora"),
        *([spread(interval(forgotten(losses, one.name)), sign="+")] if losses else []),
        f"{median(run.state_bytes for run in runs) / 1000:,.0f}",
        "" if timing is None else f"{1000 * timing.seconds_per_step:.0f}",
        "" if timing is None else f"{timing.ratio:.2f}×",
        ", ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in hyper.items()),
        f"{one.divergences} of {len(one.trials) + len(one.finals)}",
    ]


def minus(results: Results, ours: str, theirs: str) -> str:
    """The paired difference, and whether seeds or luck in tuning could have made it."""
    difference, unsure = between(results, ours, theirs)
    if difference is None:
        return ""
    return f"{spread(difference, sign='+')}{' (tie)' if abs(difference.mean) <= unsure else ''}"
