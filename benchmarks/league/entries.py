"""What is weighed, on what, and with which budget."""

from __future__ import annotations

from poise.catalog import methods

# Rules with a variant that a claim is about, and drivers. A further rule of the catalog is weighed by itself.
VARIANTS = (
    "adaptive-memory-adamw=experimental-adaptive-memory(base=adamw)",
    "amsgrad=opt-amsgrad(predictor=none)",
    "polargrad-express=polargrad(method=polar_express)",
)
DRIVERS = ("ema", "switch-ema", "sam", "drop-muon=drop-muon(around=muon)")
PASSES_OF_A_STEP = {"sam": 2}  # forward and backward passes, where they are not one

# By task: passes of a trial and of a final run. All have 8 trials and 5 seeds.
TASKS = {"code-lm": (300, 300), "digits": (300, 300)}


def names() -> list[str]:
    """Entries as `poise compare --methods` takes them: AdamW first, for it is the reference."""
    rules = {found.name for found in methods() if found.family == "optim" and found.kind == "optimizer"}
    return ["adamw", *sorted(rules - {"adamw"}), *VARIANTS, *DRIVERS]


def command(task: str) -> list[str]:
    """What `poise` is called with."""
    tune, steps = TASKS[task]
    budget = {"trials": 8, "tune-steps": tune, "steps": steps, "seeds": 5}
    return ["compare", task, "--methods", ",".join(names()), *[f"--{name}={value}" for name, value in budget.items()]]
