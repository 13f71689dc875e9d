"""What is weighed, and how a user writes it: `adamw,again=adamw,quick=lion(lr=1e-3,state=int8),sam(around=muon)`."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from poise import catalog
from poise.catalog import Method, Space
from poise.compare.adapted import adapted
from poise.compare.driven import AROUND, driven
from poise.compare.loop import move
from poise.compare.staged import ADAPTER, staged
from poise.compare.tasks import Task

NAME = re.compile(r"[\w.-]+")
AROUND_ONE = {"driver": driven, "adapter": adapted}
LOSSES_SEED = 2**20  # of the batches that a method looks at before it trains: none that a run's own seed draws


@dataclass(frozen=True)
class Entry:
    """A method, with the hyper-parameters and options that the user fixed; the rest of its space is tuned."""

    method: Method
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def space(self) -> dict[str, Space]:
        return {name: space for name, space in self.method.tune.items() if name not in self.fixed}

    def build(self, model: nn.Module, task: Task | None = None, **hyper: Any) -> Optimizer:
        """The optimizer of `model`; what looks at gradients of the task first does so on its training data."""
        if getattr(self.method.target, "reads_losses", False):
            hyper["losses"] = () if task is None else losses(task, model)
        return self.method.build(model, **self.fixed, **hyper)


def losses(task: Task, model: nn.Module) -> Iterator[Callable[[], Tensor]]:
    """Functions that each give the loss of a training batch."""
    device = next(model.parameters()).device
    for batch in task.batches("train", LOSSES_SEED):
        yield partial(task.loss, model, move(batch, str(device)))


def as_entry(entry: Entry | Method) -> Entry:
    """A method alone is an entry with nothing fixed."""
    return entry if isinstance(entry, Entry) else entry_of(entry, {})


def entry_of(method: Method, fixed: Mapping[str, Any]) -> Entry:
    """The entry of a method with what the user fixed. A driver or an adapter stands around AdamW, or what `around` names;
    a trainer of adapters around LoRA, or what `adapter` names, and that around AdamW.

    Raises:
        ValueError: if it cannot stand around that.
    """
    if method.kind == "trainer":
        adapter = catalog.get(fixed.get(ADAPTER, "lora"))
        if adapter.kind != "adapter":
            raise ValueError(f"{method.name}({ADAPTER}={adapter.name}): {adapter.name} is no adapter")
        return Entry(staged(method, entry_of(adapter, fixed).method), fixed)
    if method.kind not in AROUND_ONE:
        _check_adapted(method)
        return Entry(method, fixed)
    inside = catalog.get(fixed.get(AROUND, "adamw"))
    if method.kind != "adapter":
        _check_adapted(inside)
    return Entry(AROUND_ONE[method.kind](method, inside, dict(fixed)), fixed)


def _check_adapted(method: Method) -> None:
    if method.family == "adapt" and method.kind == "optimizer":
        name = method.name
        raise ValueError(f"{name} is an optimizer of adapters, which a task's model has none of; write lora({AROUND}={name})")


def parse(methods: str) -> dict[str, Entry]:
    """The entries of a list such as "adamw,again=adamw,lion(lr=1e-3)", by the name they are shown under.

    Raises:
        ValueError: if a name is taken twice or is not made of letters, digits, `.`, `_` and `-`, a setting is not
            NAME=VALUE, or a method is unknown.
    """
    entries: dict[str, Entry] = {}
    for text in split(methods):
        head, settings, rest = text, "", ""
        if "(" in text:
            head, _, settings = text.partition("(")
            settings, closed, rest = settings.rpartition(")")
            if not closed or rest.strip():
                raise ValueError(f"--methods {methods!r}: {text!r} must end with its closing parenthesis")
        name, _, method = (part.strip() for part in head.partition("="))
        if not NAME.fullmatch(name):
            raise ValueError(f"--methods {methods!r}: {name!r} is no name; write METHOD or NAME=METHOD, separated by commas")
        if name in entries:
            raise ValueError(f"--methods {methods!r}: {name!r} stands twice; enter the second as NAME={method or name}")
        fixed = dict(setting(part) for part in split(settings) if part.strip())
        entries[name] = entry_of(catalog.get(method or name), fixed)
    return entries


def of_family(family: str) -> str:
    """AdamW, and every method of a family that trains a model by itself or around AdamW, as `parse` takes them.

    Raises:
        ValueError: if there is none.
    """
    kinds = {"optim": ("optimizer",), "training": ("driver",), "adapt": ("adapter", "trainer")}
    names = [m.name for m in catalog.methods(family) if m.kind in kinds.get(family, ())]
    if not names:
        raise ValueError(f"--family {family!r}: none of its methods trains a model; {', '.join(kinds)} have such methods")
    return ",".join(dict.fromkeys(["adamw", *names]))


def setting(text: str) -> tuple[str, Any]:
    """ "lr=1e-3" as a name and a value; what is no Python literal is a string.

    Raises:
        ValueError: if there is no name or no value.
    """
    name, equals, value = (part.strip() for part in text.partition("="))
    if not name.isidentifier() or not equals or not value:
        raise ValueError(f"{text.strip()!r}: a setting is written NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def split(text: str) -> Iterator[str]:
    """`text` at its commas, but for those inside brackets."""
    depth, piece = 0, ""
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            yield piece
            piece = ""
        else:
            piece += letter
    yield piece
