"""What a comparison could show with its budget, and what it could not: sentences made from the results alone."""

from __future__ import annotations

from collections.abc import Iterator

from poise.compare.digits import number
from poise.compare.results import Results
from poise.compare.statistics import unsure_by

Said = tuple[str, str]  # a heading of one word or two, a sentence or two


def limits(results: Results) -> list[Said]:
    """In the order in which a reader should doubt."""
    parts = (budget, resolution, luck, edges, divergences, speedups, halfway, seconds, size)
    return [said for part in parts for said in part(results)]


def budget(results: Results) -> Iterator[Said]:
    settings = results.settings
    text = (
        f"Every method had {count(settings.trials, 'tuning trial')} of {count(settings.tune_steps, 'pass', 'passes')} and "
        f"{count(settings.seeds, 'final run')} of {count(settings.steps, 'pass', 'passes')}, on the same seeds."
    )
    idle = [found.name for found in results.methods if not found.space]
    if idle:
        text += f" {listed(idle)} had nothing to tune, and one trial."
    wide = [found.name for found in results.methods if found.widened]
    if wide:
        text += (
            f" The best of {listed(wide)} lay at an edge: the last trials drew from a wider space, and count like the others."
        )
    yield "Budget", text


def resolution(results: Results) -> Iterator[Said]:
    """The smallest differences that would not have been called a tie."""
    if len(results.methods) == 1:
        yield "Resolution", "There was one method, and nothing to compare it with."
        return
    if results.settings.seeds == 1:
        yield "Resolution", "One seed gives no interval: no difference, however large, can be told from luck."
        return
    gaps = {found.name: found.tuning_gap for found in results.methods}
    widths = {
        found.name: unsure
        for found in results.methods
        if found.name != results.reference
        and found.to_reference is not None
        and (unsure := unsure_by(found.to_reference, gaps[found.name], gaps[results.reference])) is not None
    }
    if widths:
        each = ", ".join(f"{name} {number(unsure, unsure)}" for name, unsure in widths.items())
        yield "Resolution", f"A difference to {results.reference} smaller than this would have been called a tie: {each}."


def luck(results: Results) -> Iterator[Said]:
    """What other draws would have changed, which no interval over seeds contains."""
    known = {found.name: found.tuning_gap for found in results.methods if found.tuning_gap is not None}
    if known:
        each = ", ".join(f"{name} {number(gap, gap)}" for name, gap in known.items())
        yield (
            "Luck in tuning",
            "The intervals hold the luck of the seeds, not that of the draws. From the best trial to the second best it was "
            f"{each}: about so much other draws may be worth, and the verdict reckons with it.",
        )


def edges(results: Results) -> Iterator[Said]:
    found = [f"{name} of {method.name} at the {side} end" for method in results.methods for name, side in method.edges.items()]
    if found:
        yield "Edges", f"Chosen at an edge of what was tried: {listed(found)}. Beyond it the method may do better."


def divergences(results: Results) -> Iterator[Said]:
    hit = [f"{m.name} {m.divergences} of {len(m.trials) + len(m.finals)}" for m in results.methods if m.divergences]
    if hit:
        yield "Divergence", f"Runs that diverged: {', '.join(hit)}."
    out = [found.name for found in results.methods if found.final is None]
    if out:
        yield "No place", f"{listed(out)} diverged on a seed or in every trial, and so {are(out)} not ranked."


def speedups(results: Results) -> Iterator[Said]:
    reference = results.reference
    if any(found.name == reference and found.final is None for found in results.methods):
        yield "Speed-up", f"{reference} diverged, and without it there is no speed-up."
    elif len(results.budgets) < 2 and len(results.methods) > 1:
        yield "Speed-up", f"{reference} was finished at one budget only, so no speed-up could be read off."
    lost = [str(point.passes) for point in results.budgets if point.loss is None]
    if lost:
        yield "Speed-up", f"{reference} diverged at {listed(lost)} passes; speed-ups are read off without."
    for bound, what, given in (("at least", "reached", "least"), ("at most", "stayed above", "most")):
        names = [m.name for m in results.methods if m.speedup is not None and m.speedup.bound == bound]
        if names:
            text = (
                f"No finished run of {reference} {what} the loss of {listed(names)}: the ratio given is the {given} it can be."
            )
            yield "Speed-up", text


def halfway(results: Results) -> Iterator[Said]:
    early, late = results.verdict.halfway, results.verdict.ranking
    if early and early != late and sorted(early) == sorted(late):
        yield (
            "Halfway",
            f"A look halfway would have ranked {listed(early, ', then ')}; at the end it is {listed(late, ', then ')}.",
        )
    elif early and early != late:
        yield (
            "Halfway",
            f"Halfway the ranking was {listed(early, ', then ')}; at the end {listed(late, ', then ') or 'nobody is left'}.",
        )


def seconds(results: Results) -> Iterator[Said]:
    timed = [found for found in results.methods if found.timing is not None]
    if not timed:
        yield "Seconds", "Time was not measured. Everything here is per forward and backward pass."
    elif len(timed) < len(results.methods):
        yield "Seconds", f"Time was measured for {listed([found.name for found in timed])} only."
    else:
        rounds = min(found.timing.rounds for found in timed if found.timing is not None)
        yield (
            "Seconds",
            f"Step times are of this machine and this model, from {count(rounds, 'round')} in which the methods took turns.",
        )


def size(results: Results) -> Iterator[Said]:
    runs = [run for found in results.methods for run in found.finals or found.trials]
    if runs:
        yield (
            "Scale",
            f"The model has {runs[0].parameters:,} parameters. What wins here need not win on a larger one.",
        )


def listed(names: list[str], between: str = ", ") -> str:
    """ "a, b and c", or with `between` throughout."""
    if between != ", " or len(names) < 2:
        return between.join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def count(number: int, one: str, many: str | None = None) -> str:
    """ "1 run", "2 runs"."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"
