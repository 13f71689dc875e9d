"""Finished runs on disk: rows of Optuna studies in one SQLite file, one study for each entry and split.

A row is written in one transaction when its run is finished, and never before. So a comparison that is killed loses the run it
was in and nothing else, there are no half-run rows to clean up, and `optuna-dashboard` can look on. Optuna keeps; it does not
decide what is run: it would give a trial that was killed and begun again a new number, and with it other hyper-parameters.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial
from sqlalchemy.exc import DatabaseError

from poise.catalog import Space
from poise.compare.results import Run
from poise.compare.tasks import Split

optuna.logging.set_verbosity(logging.WARNING)


@dataclass(frozen=True)
class Job:
    """Everything that a run's outcome hangs on. Two jobs that are equal need be run once."""

    task: str
    data: str  # digest
    code: str  # digest
    entry: str  # an alias is another entry, so that it is really run again
    method: str
    fixed: Mapping[str, Any]
    hyper: Mapping[str, Any]
    number: int
    seed: int
    passes: int
    split: Split
    threads: int
    device: str

    @property
    def title(self) -> str:
        """For people."""
        what = f"trial {self.number + 1}" if self.split == "tune" else f"seed {self.number + 1}"
        return f"{self.entry}: {what}, {self.passes} passes"


class Journal:
    """The finished runs in `path`, created if it does not exist.

    Raises:
        ValueError: if `path` is not such a file.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.studies: dict[str, optuna.Study] = {}
        self.rows: list[tuple[dict[str, Any], Run]] = []
        try:
            self.storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
            for study in optuna.get_all_study_names(self.storage):
                self.studies[study] = optuna.load_study(study_name=study, storage=self.storage)
                for row in self.studies[study].get_trials(deepcopy=False):
                    self.rows.append((row.user_attrs["job"], Run.model_validate_json(row.user_attrs["run"])))
        except (DatabaseError, KeyError, ValueError, RuntimeError, optuna.exceptions.OptunaError) as error:
            raise ValueError(f"{path} is not a readable journal of poise compare ({error}); --fresh starts over") from error

    def find(self, job: Job) -> Run | None:
        """The finished run of `job`, if there is one; its hyper-parameters are the job's, which JSON had made lists of."""
        wanted = plain(asdict(job))
        run = next((run for row, run in self.rows if row == wanted), None)
        return None if run is None else run.model_copy(update={"hyper": dict(job.hyper)})

    def outdated(self, codes: Collection[str]) -> int:
        """How many finished runs were made by other code than `codes`, and so are of no more use."""
        return sum(row["code"] not in codes for row, _ in self.rows)

    def add(self, job: Job, run: Run, space: Mapping[str, Space]) -> None:
        """Write a finished run down; when this returns it is on disk."""
        distributions = {name: distribution(space[name]) for name in job.hyper}
        row = create_trial(
            state=TrialState.FAIL if run.loss is None else TrialState.COMPLETE,
            value=run.loss,
            params={name: parameter(job.hyper[name]) for name in distributions},
            distributions=distributions,
            user_attrs={"job": plain(asdict(job)), "run": run.model_dump_json()},
        )
        study = f"{job.entry} {job.split}"
        if study not in self.studies:
            self.studies[study] = optuna.create_study(storage=self.storage, study_name=study, direction="minimize")
        self.studies[study].add_trial(row)
        self.rows.append((row.user_attrs["job"], run))


def plain(value: Any) -> Any:
    """`value` as JSON gives it back: tuples are lists."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def distribution(space: Space) -> BaseDistribution:
    """`space` in Optuna's words."""
    if space.kind == "choice":
        return CategoricalDistribution([parameter(option) for option in space.options])
    return FloatDistribution(space.low, space.high, log=space.kind == "log_uniform")


def parameter(value: Any) -> Any:
    """A value that Optuna can store in a row: what is no number, string or None goes by its repr."""
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)
