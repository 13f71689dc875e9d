"""What is weighed, on what, and with which budget."""

from __future__ import annotations

import re

from poise.catalog import methods

# Rules that do something but now and then, with an interval that lets them do it ten times and more in a run, and a rank below
# the widths of the models. A further rule of the catalog is weighed with its own defaults and ranges.
SETTINGS = {
    "eco": "weights=int8",
    "frugal": "update_gap=25",
    "galore": "update_proj_gap=25,rank=32",
    "natural-galore": "update_proj_gap=25,rank=32",
}
# Rules with a variant that a claim is about, and drivers.
VARIANTS = (
    "adaptive-memory-adamw=experimental-adaptive-memory(base=adamw)",
    "amsgrad=opt-amsgrad(predictor=none)",
    "polargrad-express=polargrad(method=polar_express)",
    "shampoo-32bit=shampoo-4bit(bits=32)",
)
DRIVERS = ("badam(switch_every=25)", "ema", "switch-ema", "sam", "drop-muon=drop-muon(around=muon)")
PASSES_OF_A_STEP = {"sam": 2}  # forward and backward passes, where they are not one

# By task: passes of a trial and of a final run. All have 8 trials and 5 seeds.
TASKS = {"code-lm": (150, 300), "digits": (300, 300)}


def names() -> list[str]:
    """Entries as `poise compare --methods` takes them: AdamW first, for it is the reference."""
    rules = {found.name for found in methods() if found.family == "optim" and found.kind == "optimizer"}
    entered = [f"{rule}({SETTINGS[rule]})" if rule in SETTINGS else rule for rule in sorted(rules - {"adamw"})]
    return ["adamw", *entered, *VARIANTS, *DRIVERS]


def called(entry: str) -> str:
    """The name under which an entry of `names` is shown: of `mine=sam(around=muon)`, mine."""
    return re.split(r"[=(]", entry, maxsplit=1)[0]


def command(task: str) -> list[str]:
    """What `poise` is called with."""
    tune, steps = TASKS[task]
    budget = {"trials": 8, "tune-steps": tune, "steps": steps, "seeds": 5}
    return ["compare", task, "--methods", ",".join(names()), *[f"--{name}={value}" for name, value in budget.items()]]
