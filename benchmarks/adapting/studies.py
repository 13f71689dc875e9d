"""Two models that are published or trained here, and adapters with about as many parameters that train."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from poise.compare.entries import parse

TASKS = Path(__file__).with_name("tasks")


@dataclass(frozen=True)
class Study:
    """One comparison.

    Args:
        task: name of the task's file, by which its results are known.
        about: what is trained to do what.
        methods: as `poise compare` takes them.
        trials, tune_steps, steps, seeds: the budget of each, in passes.
    """

    task: str
    about: str
    methods: tuple[str, ...]
    trials: int
    tune_steps: int
    steps: int
    seeds: int

    @property
    def file(self) -> Path:
        return TASKS / f"{self.task}.py"

    def command(self) -> list[str]:
        """`poise compare`'s, but for where and how."""
        numbers = {"trials": self.trials, "tune-steps": self.tune_steps, "steps": self.steps, "seeds": self.seeds}
        flags = [text for name, value in numbers.items() for text in (f"--{name}", str(value))]
        return ["compare", str(self.file), "--methods", ",".join(self.methods), *flags, "--budgets", ""]


OF_RANK_8 = (
    "adamw",
    "lora(rank=8)",
    "rslora=lora(rank=8,rank_stabilized=True)",
    "dora(rank=8)",
    "altlora=lora(rank=8,around=altlora,alpha=8.0)",
    "altlora-plus=lora(rank=8,around=altlora-plus,alpha=8.0)",
    "altlora-joint=lora(rank=8,around=altlora,alpha=8.0,joint=True)",
    "altlora-plus-joint=lora(rank=8,around=altlora-plus,alpha=8.0,joint=True)",
    "lora-muon=lora(rank=8,around=muon)",
)

# About 78 thousand parameters each, as LoRA of rank 8 beside all hidden layers has; and LoRA-SB with a fortieth of them.
PROSE = Study(
    "python_to_prose",
    "a GPT trained here, which had read Python, reads prose",
    (
        *OF_RANK_8,
        "periodic-lora(rank=8,every=25)",
        "lora-sb(rank=52)",
        "lora-sb-small=lora-sb(rank=8)",
        "goat(rank=6,experts=3,top_k=2)",
        "compacter(reduction=2,rank=24)",
        "lora-ggpo(rank=8)",
        "queryable-lora(rank=8)",
        "kappatune(layers=11,rank=16)",
        "diffora(rank=10,keep=0.5,steps=20)",
        "pair-customization(content_rank=7,style_rank=7,targets=linear)",
    ),
    trials=6,
    tune_steps=50,
    steps=100,
    seeds=5,
)

# About 332 thousand; LoRA-SB with a thirty-sixth of them.
GLOSSES = Study(
    "minilm_glosses",
    "all-MiniLM-L6-v2, as published, tells which meaning is that of the noun that a sentence of WordNet uses",
    (
        *OF_RANK_8,
        "periodic-lora(rank=8,every=20)",
        "lora-sb(rank=96)",
        "lora-sb-small=lora-sb(rank=16)",
        "goat(rank=6,experts=3,top_k=2)",
        "compacter(reduction=2,rank=24)",
        "lora-ggpo(rank=8)",
        "queryable-lora(rank=8)",
        "kappatune(layers=12,rank=16)",
        "diffora(rank=10,keep=0.5,steps=5)",
        "pair-customization(content_rank=8,style_rank=8,targets=linear)",
    ),
    trials=4,
    tune_steps=30,
    steps=50,
    seeds=4,
)
STUDIES = {study.task: study for study in (PROSE, GLOSSES)}


def weighed(study: Study) -> set[str]:
    """Names, in the catalog, of the methods that it weighs, but for full fine-tuning."""
    entries = parse(",".join(study.methods)).values()
    named = {entry.method.name for entry in entries} | {entry.fixed.get("around", "lora") for entry in entries}
    return named - {"adamw", "muon"}
