"""Where runs are made: in this process one after another, or in several at once. Both give the same runs.

They do because a run hangs on its job alone: its seeds are in it, and so is the number of threads, since sums of floats hang on
that. Only this process writes the journal.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol, Self

import torch

from poise.compare.entries import Entry
from poise.compare.journal import Job
from poise.compare.results import Run
from poise.compare.tasks import Task
from poise.compare.train import train

POLL = 0.2  # seconds between two looks at how far the workers are


class Watch(Protocol):
    """Who looks on while a comparison runs."""

    def begin(self, what: str) -> None:
        """A run begins."""

    def advance(self, passes: int) -> None:
        """So many forward and backward passes were taken."""

    def drop(self, passes: int) -> None:
        """So many passes will not be taken: the run was in the journal, or it was hopeless."""


class Workers(Protocol):
    """Something that makes runs."""

    def run(self, jobs: Sequence[Job], watch: Watch) -> Iterator[tuple[int, Run]]:
        """Every job's run, by its place in `jobs`, in the order in which they are finished."""
        ...


class Inline:
    """One run after another, here."""

    def __init__(self, task: Task, entries: Mapping[str, Entry]) -> None:
        self.task, self.entries = task, entries

    def run(self, jobs: Sequence[Job], watch: Watch) -> Iterator[tuple[int, Run]]:
        for place, job in enumerate(jobs):
            watch.begin(job.title)
            yield place, perform(self.task, self.entries, job, watch)


class Advance(Protocol):
    def advance(self, passes: int) -> None: ...


def perform(task: Task, entries: Mapping[str, Entry], job: Job, watch: Advance) -> Run:
    """The run of one job."""
    with threads(job.threads):
        return train(
            task,
            entries[job.entry],
            job.hyper,
            number=job.number,
            seed=job.seed,
            passes=job.passes,
            split=job.split,
            device=job.device,
            advance=watch.advance,
        )


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Let torch use so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class WorkerKilled(RuntimeError):
    """A worker process ended without a word."""


class Pool:
    """As many runs at once as there are workers, each in a process of its own.

    Raises (from `run`):
        WorkerKilled: if a worker was. What had been finished is in the journal.
    """

    def __init__(self, task: Task, entries: Mapping[str, Entry], workers: int) -> None:
        context = multiprocessing.get_context("spawn")  # a forked child of a process that has used OpenMP hangs
        self.shared = Shared(context.Value("q", 0), context.Value("b", 0), os.getpid())
        self.workers = workers
        self.executor = ProcessPoolExecutor(workers, context, _begin, (task, dict(entries), self.shared))

    def run(self, jobs: Sequence[Job], watch: Watch) -> Iterator[tuple[int, Run]]:
        if not jobs:
            return
        watch.begin(f"{jobs[0].title} and on, {min(self.workers, len(jobs))} at once")
        try:
            futures: dict[Future[Run], int] = {self.executor.submit(_work, job): place for place, job in enumerate(jobs)}
            left = set(futures)
            while left:
                done, left = wait(left, POLL, FIRST_COMPLETED)
                watch.advance(self.shared.take())
                for future in done:
                    yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise WorkerKilled(
                "a worker process was killed, perhaps because memory ran out: try fewer --workers. "
                "Finished runs are kept, and the same command goes on from there"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.shared.stop.value = 1
        self.executor.shutdown(wait=True, cancel_futures=True)


class Shared:
    """What a pool's processes share: passes taken and not yet reported, and whether to stop."""

    def __init__(self, passes: Any, stop: Any, parent: int) -> None:
        self.passes, self.stop, self.parent = passes, stop, parent

    def take(self) -> int:
        with self.passes.get_lock():
            taken, self.passes.value = self.passes.value, 0
        return taken

    def advance(self, passes: int) -> None:
        if self.stop.value:
            raise KeyboardInterrupt
        with self.passes.get_lock():
            self.passes.value += passes


_given: tuple[Task, Mapping[str, Entry], Shared] | None = None  # in a worker: what it works with


def _begin(task: Task, entries: Mapping[str, Entry], shared: Shared) -> None:
    """Set a worker up."""
    global _given
    _given = task, entries, shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent says when to stop

    def orphaned() -> None:  # a parent that was killed says nothing
        while os.getppid() == shared.parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=orphaned, daemon=True).start()


def _work(job: Job) -> Run:
    assert _given is not None
    task, entries, shared = _given
    return perform(task, entries, job, shared)
