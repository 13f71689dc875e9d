"""`results.json`: everything a comparison found, in a versioned schema that others can build on.

Where a number is null, it was not finite (the run diverged), or could not be known; the field says which.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

SCHEMA_VERSION = 2


class Record(BaseModel):
    """Base of all: what is written once is not changed, and an unknown field is an error, not a surprise."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Settings(Record):
    """The budget, the same for every method, and the seed that everything random hangs on."""

    trials: int = Field(default=8, ge=1, description="tuning trials per method, those in a widened space included")
    tune_steps: int = Field(default=300, ge=1, description="forward and backward passes per trial")
    steps: int = Field(default=300, ge=1, description="forward and backward passes per final run")
    seeds: int = Field(default=3, ge=1, le=9_999, description="final runs per method, paired across methods")
    seed: int = Field(default=0, ge=0, description="of the study")
    budgets: tuple[float, ...] = Field(
        default=(0.5, 2.0),
        description="further budgets of the reference, in units of `steps`; none: no speed-ups",
    )
    threads: int = Field(
        default=1, ge=1, description="of torch in each run; unlike the number of workers it changes sums of floats"
    )
    device: str = Field(default="cpu", description="torch device of every run")
    sampler: Literal["joint", "coordinate"] = Field(
        default="joint", description="all hyper-parameters of a trial drawn together, or swept one after another"
    )


class Run(Record):
    """One training run, its schedule finished."""

    number: int = Field(description="of the trial, or of the seed")
    seed: int = Field(description="of the initial weights and the order of the data")
    hyper: dict[str, Any] = Field(description="what the trial drew")
    passes: int = Field(description="forward and backward passes taken")
    loss: float | None = Field(description="on the held-out split, at the end; null: diverged")
    initial_loss: float | None = Field(description="on the first training batch, before the first step")
    diverged: bool = Field(description="a loss was not finite, or it ended above twice the initial loss")
    curve: list[tuple[int, float]] = Field(description="(passes, mean training loss since the point before)")
    parameters: int = Field(description="of the model")
    trainable: int | None = Field(default=None, description="those that were trained; null in older files: all of them")
    state_bytes: int = Field(description="of optimizer state, measured after the last step")
    seconds: float = Field(description="of the whole run, beside whatever else the machine was doing")

    @property
    def trained(self) -> int:
        return self.parameters if self.trainable is None else self.trainable


class Interval(Record):
    """A mean with its 95 % interval; one value alone has no bounds."""

    mean: float = Field(description="over the seeds")
    low: float | None = Field(description="null: there is one value only")
    high: float | None = Field(description="the same")


class Speedup(Record):
    """The reference's budget that reaches the same final loss, divided by the method's own."""

    passes: float = Field(description="that budget, between finished runs of the reference")
    ratio: float = Field(description="above 1: the reference needs more passes")
    low: float = Field(description="95 % bootstrap interval over the paired seeds, cut off where the reference was not run")
    high: float
    bound: Literal["exact", "at least", "at most"] = Field(
        description="the last two: no finished run of the reference lies beyond"
    )


class Timing(Record):
    """Seconds of a training step, measured apart from the runs, the steps of all methods taking turns in one process."""

    seconds_per_step: float = Field(description="median")
    optimizer_seconds_per_step: float = Field(description="median of what lies outside the forward and backward passes")
    ratio: float = Field(description="median ratio to the reference's step in the same round")
    low: float = Field(description="first quartile of that ratio")
    high: float = Field(description="third quartile")
    rounds: int = Field(description="so many times every method had its turn")


class BudgetPoint(Record):
    """The reference finished at one budget, with hyper-parameters chosen for it among its best trials."""

    passes: int = Field(description="of each run")
    hyper: dict[str, Any] = Field(description="chosen on the split `tune` at this budget")
    runs: list[Run] = Field(description="by seed, loss on the split `report`")
    loss: Interval | None = Field(description="null: it diverged on a seed")


class MethodResult(Record):
    """What one entry of the comparison did."""

    name: str = Field(description="as entered: the method's, or an alias")
    method: str = Field(description="in the catalog")
    arxiv: str | None = Field(description="number of its paper")
    fixed: dict[str, Any] = Field(description="hyper-parameters that the user set, and that were not tuned")
    space: dict[str, dict[str, Any]] = Field(description="what was drawn from, by hyper-parameter")
    widened: dict[str, dict[str, Any]] = Field(
        description="what the last trials drew from instead, where the best lay at an edge"
    )
    trials: list[Run] = Field(description="by number, loss on the split `tune`")
    best: int | None = Field(description="number of the chosen trial; null: every trial diverged")
    edges: dict[str, Literal["low", "high"]] = Field(description="chosen hyper-parameters at an end of their (widened) range")
    tuning_gap: float | None = Field(
        description="second-lowest loss among the trials minus the lowest: about what luck is worth"
    )
    finals: list[Run] = Field(description="by seed, loss on the split `report`")
    final: Interval | None = Field(description="over the seeds; null: it diverged on a seed")
    to_best: Interval | None = Field(description="paired difference of final losses to the lowest; positive is worse")
    to_reference: Interval | None = Field(description="the same to the reference method")
    speedup: Speedup | None = Field(description="null: unknown (no reference, or it diverged)")
    timing: Timing | None = Field(description="null: not measured")
    divergences: int = Field(description="among trials and finals")


class Verdict(Record):
    """Who came out ahead."""

    ranking: list[str] = Field(description="by mean final loss, without those that diverged on a seed")
    leaders: list[str] = Field(description="the winner, or those that tie for it")
    halfway: list[str] = Field(
        description="by mean training loss in the middle of the final runs: what a look too early would say"
    )
    sentence: str = Field(description="for people")


class Results(Record):
    """A finished comparison."""

    schema_version: Literal[2] = Field(default=SCHEMA_VERSION, description="raised when a field changes its meaning or goes")
    kind: Literal["poise.compare"] = Field(default="poise.compare", description="tells this file from others")
    task: str = Field(description="its name")
    unit: str = Field(description="of the loss; may be empty")
    fingerprint: str = Field(description="digest of the task's data")
    optimum: float | None = Field(description="the lowest loss there is, where the task knows it")
    settings: Settings = Field(description="the budget")
    reference: str = Field(description="the entry that others are measured against: AdamW where there is one")
    budgets: list[BudgetPoint] = Field(description="the reference at every budget, `steps` included, in ascending order")
    methods: list[MethodResult] = Field(description="in the order in which they were entered")
    verdict: Verdict = Field(description="who came out ahead")
    environment: dict[str, Any] = Field(description="versions and machine")

    def write(self, path: Path) -> None:
        """Write whole or not at all: a reader never sees half a file."""
        write_whole(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Results:
        """The results in `path`.

        Raises:
            ValueError: if it is not a comparison, or one of a schema that this version does not know.
        """
        text = path.read_text(encoding="utf-8")
        try:
            found = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path} is no results.json of poise compare: {error}") from error
        version = found.get("schema_version") if isinstance(found, dict) else None
        if version != SCHEMA_VERSION:
            raise ValueError(f"{path}: schema_version is {version!r}, this version of poise reads {SCHEMA_VERSION}")
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ValueError(f"{path} is no results.json of poise compare: {error}") from error


def write_whole(path: Path, text: str) -> None:
    """Write `text` under another name, then rename: a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
