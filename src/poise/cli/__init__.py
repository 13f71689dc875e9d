"""The program `poise`: one verb a file."""

from __future__ import annotations

import sys
from collections.abc import Sequence

INSTALL = 'poise: the command line needs {name}, which is not installed; install it with: pip install "poise[compare]"'


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `poise` and exit: 0 good, 1 a result broke a bound, 2 usage or bad input, 3 interrupted and resumable."""
    try:
        from poise.cli.app import app
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.partition(".")[0] == "poise":
            raise
        print(INSTALL.format(name=missing.name), file=sys.stderr)
        sys.exit(2)
    app(args=None if arguments is None else list(arguments), prog_name="poise")
