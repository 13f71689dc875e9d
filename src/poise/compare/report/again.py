"""The command that makes a comparison again."""

from __future__ import annotations

import shlex
from typing import Any

from poise.compare.results import MethodResult, Results, Settings
from poise.compare.tasks import EMBEDDED


def command(results: Results) -> str:
    """What to type. A task of the user's own is taken to lie in the current folder."""
    settings = results.settings
    words = ["poise", "compare", results.task if results.task in EMBEDDED else f"{results.task}.py"]
    words += ["--methods", ",".join(map(entry, results.methods))]
    for name in ("trials", "tune_steps", "steps", "seeds", "seed"):
        words += [f"--{name.replace('_', '-')}", str(getattr(settings, name))]
    for name in ("budgets", "threads", "device"):
        if (value := getattr(settings, name)) != Settings.model_fields[name].default:
            words += [f"--{name}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return shlex.join(words)


def entry(found: MethodResult) -> str:
    """An entry as it is written after `--methods`: `quick=lion(lr=0.001,state=int8)`."""
    name = found.method if found.name == found.method else f"{found.name}={found.method}"
    return f"{name}({','.join(f'{key}={plain(value)}' for key, value in found.fixed.items())})" if found.fixed else name


def plain(value: Any) -> str:
    """A value as it is typed."""
    return value if isinstance(value, str) else repr(value)
