"""Bytes of a training step, counted: every tensor that it holds, by the part of the model that it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from poise.compare import randomness
from poise.compare.entries import Entry
from poise.compare.loop import move
from poise.compare.tasks import Task
from poise.compare.train import state_bytes, tensors
from poise.training.layers.kept_bytes import kept_by

OUTSIDE = "(loss and input)"  # what no part of the model asked to be kept
REST = "(rest)"  # weights of the model itself, and state that belongs to no parameter
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList)


@dataclass(frozen=True)
class Part:
    """One part of a model, in bytes.

    Args:
        weights: parameters and buffers; a tied one counts with the part that names it first.
        gradients: of parameters that are trained, in their own dtype.
        state: what the optimizer keeps of them from step to step.
        activations: what autograd keeps from the forward to the backward pass.
    """

    name: str
    parameters: int
    weights: int
    gradients: int
    state: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.state + self.activations


@dataclass(frozen=True)
class Needs:
    """What a step needs, by part; `held` says where it was counted: on the "meta" device nothing was allocated for it."""

    parts: tuple[Part, ...]
    held: str
    batch: str

    @property
    def whole(self) -> Part:
        """All parts together."""
        sums = {name: sum(getattr(part, name) for part in self.parts) for name in Part.__dataclass_fields__ if name != "name"}
        return Part("total", **sums)

    def as_dict(self) -> dict[str, Any]:
        rows = [{**asdict(part), "total": part.total} for part in (*self.parts, self.whole)]
        return {"parts": rows[:-1], "total": rows[-1], "counted_on": self.held, "batch": self.batch}


def count(task: Task, entry: Entry, device: str = "cpu", seed: int = 0) -> Needs:
    """Count a step of `entry` on `task`.

    On the meta device, so that a model larger than the machine is counted as well as a small one; where the model, its loss or
    the optimizer cannot be run there (a `.item()`, weights read from a file), on `device`, with real numbers.
    """
    for held in ("meta", device):
        try:
            with randomness.own(seed, "cpu"):
                return _count(task, entry, held, seed)
        except Exception:  # whatever a user's code cannot do without numbers
            if held == device:
                raise
    raise AssertionError("unreachable")


def _count(task: Task, entry: Entry, held: str, seed: int) -> Needs:
    with torch.device(held):
        model = task.model()
    model.to(held).train()
    batch = move(next(task.batches("train", seed)), held)
    optimizer = entry.build(model, task)
    parts = parts_of(model)
    owner = {id(p): part for part, module in parts.items() for p in (*module.parameters(), *module.buffers())}
    found = {name: dict.fromkeys(Part.__dataclass_fields__, 0) for name in (*parts, REST, OUTSIDE)}
    for t in dict.fromkeys((*model.parameters(), *model.buffers())):  # a tied one once
        row = found[owner.get(id(t), REST)]
        row["weights"] += t.nbytes
        if isinstance(t, nn.Parameter):
            row["parameters"] += t.numel()
            row["gradients"] += t.nbytes if t.requires_grad else 0
    for p, kept in state_of(optimizer).items():
        found[owner.get(id(p), REST)]["state"] += kept
    for name, kept in activations(model, parts, lambda: task.loss(model, batch)).items():
        found[name]["activations"] += kept
    rows = [Part(**{**row, "name": name}) for name, row in found.items() if any(row.values())]
    return Needs(tuple(rows), held, described(batch))


def parts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The parts that a reader would name: the model's children, with lists and sequences of them opened; by qualified name."""
    found: dict[str, nn.Module] = {}

    def visit(module: nn.Module, name: str) -> None:
        for child, part in module.named_children():
            path = f"{name}.{child}" if name else child
            if isinstance(part, CONTAINERS) and len(list(part.children())):
                visit(part, path)
            else:
                found[path] = part

    visit(model, "")
    if len(found) == 1:  # a wrapper around the model itself
        ((name, part),) = found.items()
        if list(part.children()):
            return {f"{name}.{path}": module for path, module in parts_of(part).items()}
    return found or {"model": model}


def state_of(optimizer: Optimizer) -> dict[Any, int]:
    """Bytes of state by parameter; under None, what an optimizer says that it holds beside them."""
    found: dict[Any, int] = {p: sum(t.nbytes for t in tensors(kept.values())) for p, kept in optimizer.state.items()}
    found[None] = max(0, state_bytes(optimizer) - sum(found.values()))
    return found


def activations(model: nn.Module, parts: Mapping[str, nn.Module], forward: Callable[[], Tensor]) -> dict[str, int]:
    """Bytes that autograd keeps of one forward pass, by the part that was running when each tensor was first kept.

    A storage counts once, and weights and buffers not at all: they are there anyway.
    """
    with running(parts) as stack:
        return kept_by(forward, model, lambda: stack[-1])


@contextmanager
def running(parts: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """Within it, the last entry of what is yielded names the part whose forward pass is running."""
    stack = [OUTSIDE]
    handles = []

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: stack.append(name)

    def leave(*_: Any) -> None:
        stack.pop()

    for name, module in parts.items():
        handles.append(module.register_forward_pre_hook(enter(name)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


def described(batch: Any) -> str:
    """A batch as the shapes of its tensors."""
    if isinstance(batch, Tensor):
        return "x".join(map(str, batch.shape)) or "scalar"
    if isinstance(batch, Mapping):
        return ", ".join(f"{name} {described(value)}" for name, value in batch.items())
    if isinstance(batch, list | tuple):
        return ", ".join(described(value) for value in batch)
    return type(batch).__name__


__all__ = ["OUTSIDE", "Needs", "Part", "activations", "count", "parts_of", "state_of"]
