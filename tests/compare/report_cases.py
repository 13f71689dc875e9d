"""Finished comparisons made by hand, from a full one to those that leave a report little to show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from poise.compare.results import BudgetPoint, MethodResult, Results, Run, Settings, Speedup, Timing, Verdict
from poise.compare.statistics import interval, paired

LR = {"kind": "log_uniform", "low": 1e-4, "high": 1e-1, "options": ()}
MOMENTUM = {"kind": "uniform", "low": 0.5, "high": 0.99, "options": ()}
RULE = {"kind": "choice", "low": 0.0, "high": 0.0, "options": ("cubic", "polar")}
SETTINGS = Settings.model_validate(dict(trials=6, tune_steps=150, steps=300, seeds=5))
HOSTILE = "</script><img src=x onerror=alert(1)>{{ 7 * 7 }}%{x}"
LONG = "an_entry_with_a_name_that_nobody_would_type_twice_" * 6


def run(number: int, loss: float | None, seed: int = 0, passes: int = 300, state: int = 800, **facts: Any) -> Run:
    """A run of which only `loss` matters; its curve falls towards it."""
    end = 2.0 if loss is None else loss
    stop = passes // 3 if loss is None else passes
    curve = [(at, end + 3.0 * math.exp(-at / 40) + 0.01 * math.sin(at + 7 * seed)) for at in range(10, stop + 1, 10)]
    known = dict(
        number=number,
        seed=seed,
        hyper={"lr": 0.003},
        passes=stop,
        loss=loss,
        initial_loss=5.5,
        diverged=loss is None,
        curve=curve,
        parameters=100,
        state_bytes=state,
        seconds=1.5,
    )
    return Run.model_validate(known | facts)


def method(
    name: str,
    losses: Sequence[float | None],
    reference: Sequence[float | None],
    lowest: Sequence[float | None],
    *,
    state: int = 800,
    **facts: Any,
) -> MethodResult:
    """An entry with these final losses, six trials over a learning rate, of which the fourth was the best."""
    rates = [1e-4 * 10 ** (3 * place / 5) for place in range(6)]
    trials = [
        run(n, None if n == 5 else fmean([v for v in losses if v is not None] or [2.5]) + 0.05 * (n - 3) ** 2, hyper={"lr": lr})
        for n, lr in enumerate(rates)
    ]
    chosen = trials[3].hyper
    finals = [run(n, loss, seed=n + 1, state=state, hyper=chosen) for n, loss in enumerate(losses)]
    known: dict[str, Any] = dict(
        name=name,
        method=name,
        arxiv="2302.06675",
        fixed={},
        space={"lr": LR},
        widened={},
        trials=trials,
        best=3,
        edges={},
        tuning_gap=0.011,
        finals=finals,
        final=interval(losses),
        to_best=paired(losses, lowest),
        to_reference=paired(losses, reference),
        speedup=None,
        timing=None,
        divergences=sum(r.diverged for r in [*trials, *finals]),
    )
    return MethodResult.model_validate(known | facts)


def timing(ratio: float) -> Timing:
    return Timing(seconds_per_step=0.0123 * ratio, optimizer_seconds_per_step=0.0021, ratio=ratio, low=0.9, high=1.1, rounds=40)


def speedup(ratio: float, bound: Any = "exact") -> Speedup:
    return Speedup(passes=300 * ratio, ratio=ratio, low=ratio - 0.11, high=ratio + 0.13, bound=bound)


def point(passes: int, losses: Sequence[float | None]) -> BudgetPoint:
    runs = [run(n, loss, seed=n + 1, passes=passes) for n, loss in enumerate(losses)]
    return BudgetPoint(passes=passes, hyper={"lr": 0.003}, runs=runs, loss=interval(losses))


def made(methods: Sequence[MethodResult], **facts: Any) -> Results:
    """A comparison of `methods`, the first of them the reference."""
    placed = sorted((found.final.mean, found.name) for found in methods if found.final is not None)
    ranking = [name for _, name in placed]
    sentence = f"{ranking[0]} wins at {placed[0][0]:.4f}" if ranking else "no verdict: every method diverged"
    known: dict[str, Any] = dict(
        task="code-lm",
        unit="nats per byte",
        fingerprint="5ca1ab1e",
        optimum=None,
        settings=SETTINGS,
        reference=methods[0].name,
        budgets=[],
        methods=list(methods),
        verdict=Verdict(ranking=ranking, leaders=ranking[:1], halfway=ranking, sentence=sentence),
        environment={"poise": "0.1.0", "torch": "2.13.0", "platform": "Linux & <friends>", "cpus": 2},
    )
    return Results.model_validate(known | facts)


ADAMW = [2.241, 2.262, 2.237, 2.255, 2.249]
LION = [2.229, 2.241, 2.230, 2.247, 2.236]
MUON = [2.121, 2.135, 2.118, 2.140, 2.127]


def full() -> Results:
    """Everything there is: three that finish, one that diverges, budgets, times, edges, bounds, every kind of space."""
    rates = [{"lr": 1e-4 * 4**n, "momentum": 0.5 + 0.08 * n, "rule": ("cubic", "polar")[n % 2]} for n in range(6)]
    trials = [run(n, 2.13 + 0.02 * (n - 4) ** 2, hyper=hyper) for n, hyper in enumerate(rates)]
    entries = [
        method("adamw", ADAMW, ADAMW, MUON, timing=timing(1.0), arxiv="1711.05101"),
        method("lion", LION, ADAMW, MUON, state=400, timing=timing(0.97), speedup=speedup(1.08), edges={"lr": "low"}),
        method(
            "muon",
            MUON,
            ADAMW,
            MUON,
            state=450,
            timing=timing(1.12),
            arxiv=None,
            fixed={"state": "int8"},
            space={"lr": LR, "momentum": MOMENTUM, "rule": RULE},
            widened={"lr": {**LR, "high": 1.0}},
            trials=trials,
            best=4,
            edges={"momentum": "high"},
            speedup=speedup(2.0, "at least"),
            divergences=0,
        ),
        method("wild", [2.5, None, 2.6, 2.4, 2.5], ADAMW, MUON, method="sgd", timing=timing(0.9), state=0),
    ]
    budgets = [
        point(150, [loss + 0.17 for loss in ADAMW]),
        point(300, ADAMW),
        point(600, [loss - 0.1 for loss in ADAMW]),
    ]
    found = made(entries, budgets=budgets)
    verdict = found.verdict.model_copy(update={"halfway": ["lion", "muon", "adamw"]})
    return found.model_copy(update={"verdict": verdict})


def minimal() -> Results:
    """One method, one seed, nothing to tune, nothing timed, no budgets."""
    only = method(
        "sgd", [1.25], [1.25], [1.25], space={}, trials=[run(0, 1.3, hyper={})], best=0, tuning_gap=None, divergences=0
    )
    only = only.model_copy(update={"finals": [run(0, 1.25, seed=1, hyper={})], "arxiv": None})
    settings = SETTINGS.model_copy(update={"seeds": 1, "budgets": ()})
    return made([only], settings=settings, unit="", task="mine")


def all_diverged() -> Results:
    """Every trial of every method diverged."""
    trials = [run(n, None, hyper={"lr": 10.0**-n}) for n in range(6)]
    gone: dict[str, Any] = dict(trials=trials, best=None, finals=[], divergences=6, tuning_gap=None)
    nothing: list[float | None] = [None] * 5
    return made([method(name, nothing, nothing, nothing, **gone) for name in ("adamw", "lion")])


def twenty() -> Results:
    """More methods than there are hues."""
    losses = {f"method-{n:02}": [2.0 + 0.03 * n + 0.002 * seed for seed in range(5)] for n in range(20)}
    first = losses["method-00"]
    return made([method(name, values, first, first, state=40 * n) for n, (name, values) in enumerate(losses.items())])


def known_optimum() -> Results:
    """A convex problem: losses fall towards a number that the task knows, and one method reaches it to rounding."""
    near, there = [0.25 + 1e-6 * n for n in (3, 4, 5, 4, 3)], [0.25] * 5
    return made([method("adamw", near, near, there), method("newton", there, near, there)], optimum=0.25, unit="")


def named(name: str) -> Results:
    """`full`, its second entry renamed."""
    found = full()
    second = found.methods[1].model_copy(update={"name": name})
    verdict = found.verdict.model_copy(update={"ranking": ["muon", name, "adamw"], "sentence": f"muon wins, before {name}"})
    return found.model_copy(update={"methods": [found.methods[0], second, *found.methods[2:]], "verdict": verdict})


def later() -> Results:
    """`full` on another day: lion got worse, muon is not there, newton is new, and seeds are the same."""
    found = full()
    worse = method("lion", [loss + 0.05 for loss in LION], ADAMW, LION, state=400)
    new = method("newton", LION, ADAMW, LION)
    return found.model_copy(
        update={"methods": [found.methods[0], worse, new], "environment": found.environment | {"torch": "2.14.0"}}
    )


CASES = {
    "full": full,
    "minimal": minimal,
    "all diverged": all_diverged,
    "twenty": twenty,
    "known optimum": known_optimum,
    "hostile name": lambda: named(HOSTILE),
    "long name": lambda: named(LONG),
}
