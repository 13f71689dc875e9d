"""The league's page: a table and two figures for each task, then what became of the published claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from poise import catalog
from poise.compare.digits import BOUNDS, number, ratio, spread
from poise.compare.report.rows import between as bounds
from poise.compare.results import MethodResult, Results

from . import entries
from .claims import CLAIMS, Claim
from .judging import Finding, between, seconds_speedup, state

OUTCOMES = {
    "held": "Held",
    "not seen": "Not seen: a tie",
    "contradicted": "Did not hold",
    "not judged": "Cannot be judged here",
}

HEAD = """\
# League table

Every optimizer of the catalog under one budget, on two small tasks. The table says what these rules do *at this scale, tuned
this much*, and nothing about a billion parameters.

{budgets}

How it is done is told in [Comparing fairly](../comparing.md): equal tuning over the ranges that each method declares, paired
seeds, finished schedules, and a tie wherever seeds or luck in tuning could have made the difference. Loss is on held-out
data. A driver that needs two passes for a step makes half as many steps. Seconds are measured apart from the runs, in turns;
`update` is what a step takes beside its passes. The speed-up is AdamW's budget for the same loss over the method's own; in
seconds it is divided by what a pass costs. `!` after lr: chosen at the end of its range.{missing}

Made from the JSON files beside it by `python benchmarks/league_table.py page`. `python benchmarks/league_table.py run` makes
those, and goes on where it was stopped.
"""

CLAIMS_HEAD = """\
Each claim is held against the numbers above; one that comes out differently on two tasks stands under both. "A tie up to" is
what seeds and luck in tuning could have made.
"""


def render(found: Mapping[str, Results]) -> str:
    """The page, in Markdown."""
    budgets = "\n".join(f"- {budget(results)}" for results in found.values())
    parts = [HEAD.format(budgets=budgets, missing=missing(found))]
    parts += [section(results) for results in found.values()]
    parts += ["## What papers say, and what was seen\n", CLAIMS_HEAD, judged(found, CLAIMS)]
    return "\n".join(parts)


def budget(results: Results) -> str:
    """One line on what every method got."""
    s, runs = results.settings, results.methods[0].finals
    parameters = f" ({runs[0].parameters:,} parameters)" if runs else ""
    times = " and ".join(f"{times:g}" for times in s.budgets)
    return (
        f"**{results.task}**{parameters}: {s.trials} tuning trials of {s.tune_steps} passes, then {s.seeds} seeds of {s.steps} "
        f"passes; {results.reference} also at {times} times the passes. On {results.environment.get('cpus')} cores with torch "
        f"{results.environment.get('torch')}, one thread a run."
    )


def missing(found: Mapping[str, Results]) -> str:
    """What has come into the catalog since."""
    weighed = set.intersection(*({one.name for one in results.methods} for results in found.values()))
    later = [name for entry in entries.names() if (name := entries.called(entry)) not in weighed]
    return f"\n\nIn the catalog, and not weighed yet: {', '.join(later)}." if later else ""


def section(results: Results) -> str:
    """A task: verdict, figures, table."""
    task = results.task
    ordered = sorted(results.methods, key=lambda found: found.final.mean if found.final else float("inf"))
    unit = f", {results.unit}" if results.unit else ""
    head = ["", f"final loss{unit}", f"minus {results.reference}", "speed-up", "in seconds", "state B/param", "step"]
    head += ["update ms", "lr", "diverged"]
    rows = [" | ".join(cells(results, found)) for found in ordered]
    return "\n".join(
        [
            f"## {task}\n",
            f"Verdict: {results.verdict.sentence}.\n",
            f"![Final loss of every method minus AdamW's]({task}-loss.svg)\n",
            f"![Speed-up of every method over AdamW, in passes and in seconds]({task}-speed.svg)\n",
            f"| {' | '.join(head)} |",
            f"|{'---|' * len(head)}",
            *[f"| {row} |" for row in rows],
            f"\nEvery run, every trial: [report]({task}-report.html), made from [{task}.json]({task}.json).\n",
        ]
    )


def cells(results: Results, found: MethodResult) -> list[str]:
    reference = found.name == results.reference
    difference, unsure = between(results, found.name, results.reference)
    tie = difference is not None and abs(difference.mean) <= unsure and not reference
    seconds = seconds_speedup(results, found)
    timing = found.timing
    best = {} if found.best is None else found.trials[found.best].hyper
    lr = found.fixed.get("lr", best.get("lr"))
    speed = "" if reference or found.speedup is None else f"{ratio(found.speedup)} ({bounds(found.speedup)})"
    return [
        f"**{found.name}**" if found.name in results.verdict.leaders else found.name,
        spread(found.final),
        "" if reference or difference is None else f"{spread(difference, sign='+')}{' (tie)' if tie else ''}",
        speed,
        "" if reference or found.speedup is None or seconds is None else f"{BOUNDS[found.speedup.bound]}{seconds[0]:.2f}×",
        f"{state(found):.2f}",
        "" if timing is None else f"{timing.ratio:.2f}×",
        "" if timing is None else number(1e3 * timing.optimizer_seconds_per_step, 1e2 * timing.optimizer_seconds_per_step),
        "" if lr is None else f"{float(lr):.2g}{' !' if 'lr' in found.edges else ''}",
        f"{found.divergences} of {len(found.trials) + len(found.finals)}",
    ]


def judged(found: Mapping[str, Results], claims: Sequence[Claim]) -> str:
    """Every claim under its outcome; one that comes out differently on two tasks stands under both."""
    by_outcome: dict[str, list[str]] = {outcome: [] for outcome in OUTCOMES}
    for claim in claims:
        findings = verdicts(claim, found)
        if not findings:
            by_outcome["not judged"].append(line(claim, [claim.why]))
        for outcome in OUTCOMES:
            told = [f"{task}: {finding.why}" for task, finding in findings.items() if finding.outcome == outcome]
            if told:
                by_outcome[outcome].append(line(claim, [*told, claim.why] if claim.why else told))
    parts = []
    for outcome, lines in by_outcome.items():
        parts += [f"### {OUTCOMES[outcome]} ({len(lines)})\n", *(lines or ["Nothing."]), ""]
    return "\n".join(parts)


def verdicts(claim: Claim, found: Mapping[str, Results]) -> dict[str, Finding]:
    """What each task says of a claim."""
    if claim.judge is None:
        return {}
    return {task: claim.judge(results) for task, results in found.items() if not claim.tasks or task in claim.tasks}


def line(claim: Claim, told: list[str]) -> str:
    paper = catalog.get(claim.method).paper
    address = f"https://arxiv.org/abs/{paper.arxiv}" if paper.arxiv else paper.url
    title = f"[{paper.title}]({address})" if address else paper.title
    return f"- **{claim.method}**, {title}: {claim.says}. {'; '.join(told)}."
