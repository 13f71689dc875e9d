"""Methods weighed at several sizes of model and several budgets, each tuned anew at every one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from poise.catalog import Method, Paper, method
from poise.compare.entries import Entry, as_entry
from poise.compare.journal import Journal
from poise.compare.plan import check, check_trials
from poise.compare.results import Results, Settings
from poise.compare.study import compare
from poise.compare.tasks import Task
from poise.compare.workers import Pool


@method(
    "across-scales",
    family="compare",
    kind="protocol",
    paper=Paper("Fantastic Pretraining Optimizers and Where to Find Them", arxiv="2509.02046", year=2025),
    mutant=('"sampler": "coordinate"', '"sampler": "joint"'),
)
def across_scales(
    tasks: Sequence[Task],
    methods: Mapping[str, Entry | Method],
    settings: Settings,
    steps: Sequence[int],
    folder: Path,
    *,
    workers: int = 1,
) -> dict[tuple[str, int], Results]:
    """The study of pretraining optimizers: sizes of model by budgets, every method tuned for each, AdamW first of all.

        tasks.load(name) for name in ("code-lm-small", "code-lm", "code-lm-large"),   steps (300, 600)

    For every task and every number of steps, one comparison, under the rules of the paper:

    - all hyper-parameters of every method are swept one after another (`sampler="coordinate"`), at this size and budget;
      no setting is carried over from another;
    - runs are compared when their schedule has ended; what the middle of them would have said is kept beside it, as
      `verdict.halfway` beside `verdict.ranking`;
    - a speed-up is the budget of AdamW, tuned and finished, that reaches the same final loss (`settings.budgets`), over the
      method's own. Between finished budgets there are lines, where the paper fits a power law;
    - AdamW takes part. So should a method for matrices and one for scalars: Muon and Lion.

    Args:
        settings: `steps`, `tune_steps` and `sampler` are set by this.
        folder: gets `TASK-STEPS/results.json` and a journal for each; called again, it goes on from there.
        workers: runs at once.

    Raises:
        ValueError: if AdamW is not among the methods, two tasks have one name, or `settings.trials` are too few to sweep
            every hyper-parameter once.

    Source: "Fantastic Pretraining Optimizers and Where to Find Them" (arXiv 2509.02046).
    """
    entries = {name: as_entry(entry) for name, entry in methods.items()}
    if not any(entry.method.name == "adamw" for entry in entries.values()):
        raise ValueError(f"methods: {', '.join(entries) or 'none'}: adamw must be one of them, others are measured against it")
    if len({task.name for task in tasks}) < len(tasks):
        raise ValueError(f"tasks: {', '.join(task.name for task in tasks)}: each needs a name of its own")
    cells = [(task, at, told(settings, at)) for task in tasks for at in steps]
    for task, _, given in cells:
        check(entries, task)
        check_trials(entries, given)
    found = {}
    for task, at, given in cells:
        home = folder / f"{task.name}-{at}"
        with Pool(task, entries, workers) if workers > 1 else nullcontext() as pool:
            results = compare(task, entries, given, Journal(home / "journal.db"), workers=pool, timing=False)
        results.write(home / "results.json")
        found[task.name, at] = results
    return found


def told(settings: Settings, steps: int) -> Settings:
    """The settings of one size and budget."""
    return Settings.model_validate({**settings.model_dump(), "steps": steps, "tune_steps": steps, "sampler": "coordinate"})
