"""How the program ends."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import typer

BROKEN, USAGE, INTERRUPTED = 1, 2, 3


@contextmanager
def bad_input() -> Iterator[None]:
    """Turn what is raised over bad input into one line and exit code 2.

    Stands around the reading of input only: the same exceptions out of the work itself are defects and keep their traceback.
    """
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise stop(f"poise: {error}", USAGE) from error


@contextmanager
def interruptible() -> Iterator[None]:
    """Make SIGTERM what Ctrl-C is, a KeyboardInterrupt: schedulers take a machine back with it."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def stop(message: str, code: int) -> typer.Exit:
    """Say `message` on stderr; raise what is returned."""
    typer.echo(message, err=True)
    return typer.Exit(code)
