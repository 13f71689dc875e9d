"""The progress bar of long work: what runs now, how far, how fast, how long still."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text


class Rate(ProgressColumn):
    """Passes a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s")


class Bar:
    """Follows a comparison (a `poise.compare.study.Watch`) on stderr; silent where there is no terminal or `quiet` is asked.

    What is dropped leaves the total instead of counting as done, so that a resumed study does not show a rate it never had.
    """

    def __init__(self, total: int, quiet: bool) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)
        self.total = total
        self.task = self.progress.add_task("", total=total)

    def begin(self, what: str) -> None:
        self.progress.update(self.task, description=what)

    def advance(self, passes: int) -> None:
        self.progress.advance(self.task, passes)

    def drop(self, passes: int) -> None:
        self.total -= passes
        self.progress.update(self.task, total=self.total)

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()


class BytesBar:
    """Follows work over bytes, part after part, on stderr; silent where there is no terminal or `quiet` is asked."""

    def __init__(self, quiet: bool) -> None:
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)
        self.part = ""
        self.task = self.progress.add_task("", total=None)

    def at(self, part: str, done: int, total: int) -> None:
        """`done` of `total` bytes of a part; the rate and the time left are that part's."""
        if part != self.part:
            self.part = part
            self.progress.reset(self.task, total=total, completed=done, description=part)
        self.progress.update(self.task, completed=done, total=total)

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()
