"""`results.json`: everything a comparison found, in a versioned schema that others can build on.

Where a number is null, it was not finite: the run diverged.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1


class Record(BaseModel):
    """Base of all: what is written once is not changed, and an unknown field is an error, not a surprise."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Settings(Record):
    """The budget, the same for every method, and the seed that everything random hangs on."""

    trials: int = Field(8, ge=1, description="tuning trials per method")
    tune_steps: int = Field(300, ge=1, description="forward and backward passes per trial")
    steps: int = Field(300, ge=1, description="forward and backward passes per final run")
    seeds: int = Field(3, ge=1, le=9_999, description="final runs per method, paired across methods")
    seed: int = Field(0, ge=0, description="of the study")


class Run(Record):
    """One training run, its schedule finished."""

    number: int = Field(description="of the trial, or of the seed")
    seed: int = Field(description="of the initial weights and the order of the data")
    hyper: dict[str, Any]
    passes: int = Field(description="forward and backward passes taken")
    loss: float | None = Field(description="on the held-out split, at the end")
    initial_loss: float | None = Field(description="on the first training batch, before the first step")
    diverged: bool = Field(description="the loss ended above the initial loss, or was not finite at some step")
    curve: list[tuple[int, float]] = Field(description="(passes, mean training loss since the point before)")
    parameters: int
    state_bytes: int = Field(description="of optimizer state, measured after the last step")
    seconds_per_step: float = Field(description="median; indicative, since other runs may share the machine")
    optimizer_seconds_per_step: float = Field(description="of that, outside the forward and backward passes")


class Interval(Record):
    """A mean with its 95 % t interval; one value alone has no bounds."""

    mean: float
    low: float | None
    high: float | None


class MethodResult(Record):
    """What one entry of the comparison did."""

    name: str = Field(description="as entered: the method's, or an alias")
    method: str = Field(description="in the catalog")
    arxiv: str | None
    space: dict[str, dict[str, Any]] = Field(description="what was drawn from, by hyper-parameter")
    trials: list[Run] = Field(description="by number, loss on the split `tune`")
    best: int | None = Field(description="number of the chosen trial; null: every trial diverged")
    edges: dict[str, Literal["low", "high"]] = Field(description="chosen hyper-parameters at an end of their range")
    finals: list[Run] = Field(description="by seed, loss on the split `report`")
    final: Interval | None
    to_best: Interval | None = Field(description="paired difference of final losses to the lowest; positive is worse")
    to_reference: Interval | None = Field(description="the same to the reference method")
    divergences: int = Field(description="among trials and finals")


class Verdict(Record):
    """Who came out ahead."""

    ranking: list[str] = Field(description="by mean final loss, without those that diverged on a seed")
    leaders: list[str] = Field(description="the winner, or those that tie for it")
    sentence: str


class Results(Record):
    """A finished comparison."""

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Literal["poise.compare"] = "poise.compare"
    task: str
    unit: str
    fingerprint: str = Field(description="digest of the task's data")
    settings: Settings
    reference: str = Field(description="the entry that `to_reference` refers to: AdamW where there is one")
    methods: list[MethodResult]
    verdict: Verdict
    environment: dict[str, Any] = Field(description="versions and machine")

    def write(self, path: Path) -> None:
        """Write whole or not at all: a reader never sees half a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        with partial.open("w", encoding="utf-8") as file:
            file.write(self.model_dump_json(indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    @classmethod
    def read(cls, path: Path) -> Results:
        """The results in `path`.

        Raises:
            ValueError: if it is not a comparison, or one of a schema that this version does not know.
        """
        text = path.read_text(encoding="utf-8")
        found = json.loads(text)
        version = found.get("schema_version") if isinstance(found, dict) else None
        if version != SCHEMA_VERSION:
            raise ValueError(f"{path}: schema_version is {version!r}, this version of poise reads {SCHEMA_VERSION}")
        return cls.model_validate_json(text)
