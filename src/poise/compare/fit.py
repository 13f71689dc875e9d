"""One long training run that survives its process: `poise train`.

    runs/train/code-lm/
      checkpoint.pt     everything that the run hangs on, replaced as a whole
      progress.json     what a program reads while it runs
      model/            at the end: the weights as safetensors, in the layout of Hugging Face where the model has one

A run that is killed and started again takes the very steps it would have taken, bit for bit on the same device and with the
same number of threads.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import nn

from poise import adapt
from poise.compare import provenance, randomness
from poise.compare.entries import Entry
from poise.compare.journal import plain
from poise.compare.loop import Loop
from poise.compare.results import write_whole
from poise.compare.tasks import Task
from poise.compare.train import finite, state_bytes

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class Fit:
    """What is trained, and for how long.

    Args:
        passes: forward and backward passes of the whole run; the schedule ends with them.
        every: passes between two checkpoints.
    """

    task: Task
    entry: Entry
    seed: int
    passes: int
    folder: Path
    every: int = 100
    device: str = "cpu"

    @property
    def identity(self) -> dict[str, Any]:
        """A checkpoint of another run than this one is not gone on from."""
        return {
            "task": self.task.name,
            "data": self.task.fingerprint,
            "method": self.entry.method.name,
            "settings": json.dumps(plain(self.entry.fixed), sort_keys=True, default=repr),
            "seed": self.seed,
            "passes": self.passes,
        }

    def checkpoint(self) -> dict[str, Any] | None:
        """What the last checkpoint holds; None if there is none.

        Raises:
            ValueError: if it is of another run, or cannot be read.
        """
        path = self.folder / CHECKPOINT
        if not path.exists():
            return None
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            known = state["identity"]
        except Exception as error:
            raise ValueError(f"{path} cannot be read ({error}); --fresh starts over") from error
        other = [f"{key} {known.get(key)!r}, not {value!r}" for key, value in self.identity.items() if known.get(key) != value]
        if other:
            raise ValueError(f"{path} is of another run: {'; '.join(other)}. Choose another --out, or --fresh to start over")
        return state

    def taken(self) -> int:
        """Passes that need not be taken again."""
        state = self.checkpoint()
        return 0 if state is None else int(state["taken"].sum())


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    passes: int
    diverged: bool
    loss: float | None  # on the split `report`; None if it diverged
    tune_loss: float | None
    resumed_from: int
    folder: Path


def fit(run: Fit, advance: Callable[[int, float], None] = lambda passes, loss: None) -> Outcome:
    """Train from the last checkpoint, or from the start, to the end of the schedule; then write the model.

    Args:
        advance: told after every step how many passes it took, and the loss before it.

    Raises:
        ValueError: if the folder holds a checkpoint of another run.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    with randomness.own(run.seed, run.device):
        build = partial(run.entry.build, task=run.task)
        loop = Loop(run.task, build, seed=run.seed, passes=run.passes, device=run.device)
        begun = restore(run, loop)
        written = begun
        while not loop.finished and not loop.hopeless:
            taken = loop.step()
            advance(taken, loop.losses[-1])
            if loop.done - written >= run.every and not loop.finished and not loop.hopeless:
                save(run, loop)
                written = loop.done
        hopeless = loop.hopeless
        tune, report = (None, None) if hopeless else (finite(loop.evaluate("tune")), finite(loop.evaluate("report")))
        if not hopeless:
            save(run, loop)
            with loop.evaluating():
                export_all(loop.model, run.folder)
    outcome = Outcome(loop.done, hopeless, report, tune, begun, run.folder)
    write_progress(run, loop, outcome)
    return outcome


def save(run: Fit, loop: Loop) -> None:
    """Write the checkpoint under another name, to the disk, and rename it: there is always one whole."""
    state = {
        "identity": run.identity,
        "model": loop.model.state_dict(),
        "optimizer": loop.optimizer.state_dict(),
        "schedule": loop.schedule.state_dict(),
        "losses": torch.tensor(loop.losses, dtype=torch.float64),
        "taken": torch.tensor(loop.taken, dtype=torch.int64),
        "random": randomness.state(run.device),
    }
    partial = run.folder / f"{CHECKPOINT}.partial"
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(run.folder / CHECKPOINT)
    write_progress(run, loop)


def restore(run: Fit, loop: Loop) -> int:
    """Put `loop` where the checkpoint left off; returns the passes already taken, 0 if there is no checkpoint."""
    state = run.checkpoint()
    if state is None:
        return 0
    loop.model.load_state_dict(state["model"])
    loop.optimizer.load_state_dict(state["optimizer"])
    loop.schedule.load_state_dict(state["schedule"])
    loop.losses, loop.taken = state["losses"].tolist(), state["taken"].tolist()
    loop.done = loop.prepared + sum(loop.taken)
    # The batches that were read are read again: whatever the stream draws from is then where it was.
    next(islice(loop.stream, len(loop.taken) - 1, None), None) if loop.taken else None
    randomness.set_state(state["random"], run.device)
    return loop.done


def export_all(model: nn.Module, folder: Path) -> None:
    """Write the weights; of an adapted model the adapters, if the base is what it was, and the weights with them folded in
    where that can be."""
    kept = adapt.attached(model)
    if kept is None:
        export(model, folder / "model")
        return
    if kept.rewritten:  # adapters would stand beside a base that nobody has
        shutil.rmtree(folder / "adapter", ignore_errors=True)
    else:
        adapt.export(model, folder / "adapter")
    if all(one.foldable for one in adapt.adapters(model).values()):
        export(adapt.detach(adapt.fold(copy.deepcopy(model))), folder / "model")


def export(model: nn.Module, folder: Path) -> None:
    """Write the weights: as the model itself would (`save_pretrained`), or as one safetensors file."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    writer = getattr(model, "save_pretrained", None)
    if callable(writer):
        writer(partial)
    else:
        save_model(model, str(partial / "model.safetensors"))
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


def write_progress(run: Fit, loop: Loop, outcome: Outcome | None = None) -> None:
    found = {
        **run.identity,
        "passes_taken": loop.done,
        "curve": loop.curve(),
        "state_bytes": state_bytes(loop.optimizer),
        "parameters": sum(p.numel() for p in loop.model.parameters()),
        "finished": outcome is not None,
        "diverged": outcome is not None and outcome.diverged,
        "loss": {"tune": outcome.tune_loss, "report": outcome.loss} if outcome is not None else None,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": provenance.environment(),
    }
    write_whole(run.folder / "progress.json", json.dumps(found, indent=1) + "\n")
