"""A recipe over opened models: the plan, what is observed, and rows of the result, whichever are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import poise
from poise.checkpoint import Checkpoint, CheckpointError, count_rows
from poise.checkpoint.planned import Planned

from .adapters import Joined, are_adapters
from .embeddings import mapped_rows, row_maps
from .moments import SecondMoments
from .opening import open_parents, place
from .parents import Parent
from .plan import Line, Part, Plan
from .planning import Planner
from .protocol import Place, build, observer_of, wide
from .recipe import Recipe, Reference
from .recipe.choosing import Chosen
from .recipe.names import Resolved, resolve
from .side_files import SideFiles

TILE = 4 * 2**20  # bytes of float32 rows of one model that are merged at once
Progress = Callable[[str, int, int], None]  # which pass, bytes done, bytes in all


@dataclass
class Merger:
    """A recipe over opened models: its plan, and the rows that come of it.

    Args:
        opened: models that are open already, by reference.
        settings: beat the recipe's.
        seed: of methods that draw, where the recipe names none.
        dtype: of the result; beats the recipe's.
        common_rows: where vocabularies differ and the recipe names no tokenizer, take the rows that all models have.
    """

    recipe: Recipe
    opened: Mapping[Reference, Checkpoint] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    dtype: str | None = None
    common_rows: bool = False
    function: Callable[..., Tensor] | None = None

    def __post_init__(self) -> None:
        name = self.dtype or self.recipe.dtype
        dtype = getattr(torch, name, None) if name is not None else None
        if name is not None and dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"dtype={name!r}: must be float16, bfloat16, float32 or float64")
        self.method: Resolved = resolve(self.recipe.method, self.function, own=self.recipe.own)
        self.parents: list[Parent] = open_parents(self.recipe, self.opened)
        fixed = dict(self.settings)
        said = {key for _, level in Chosen(self.recipe, self.method, fixed).levels() for key in level}
        if self.seed is not None and "seed" in self.method.keys and "seed" not in said:
            fixed["seed"] = self.seed
        self.side_files = SideFiles(self.recipe, self.parents)
        target, maps, vocabularies = self.side_files.target, None, self.side_files.vocabularies
        if target is not None and self.recipe.tokenizer is not None:
            base = None if self.recipe.base is None else self.recipe.models.index(self.recipe.base)
            maps = row_maps(target, vocabularies, self.parents, base, self.recipe.tokenizer.tokens)
        self.chosen = Chosen(self.recipe, self.method, fixed)
        self.planner = Planner(self.chosen, self.parents, maps=maps, common_rows=self.common_rows, dtype=dtype)
        self.plan: Plan
        self.adapters: Joined | None = None
        if are_adapters(self.parents):
            self.plan = Plan(errors=list(self.chosen.errors()), notes=self.chosen.notes())
            try:
                self.adapters = Joined(self.parents, self.chosen, dtype)
            except ValueError as error:
                self.plan.errors.append(error)
        else:
            self.plan = self.planner()
        self.lines = {line.name: line for line in self.plan.lines}
        self.fixed = fixed
        self.seen: Any = None
        self.beside: dict[Any, Mapping[str, Tensor]] = {}
        self.offsets: dict[str, int] = {}
        offset = 0
        for name in sorted(name for name, line in self.lines.items() if not line.copied):
            self.offsets[name] = offset
            offset += self.lines[name].shape.numel()

    @property
    def planned(self) -> list[Planned]:
        return [Planned(line.name, line.shape, line.dtype) for line in self.plan.lines]

    def fingerprint(self) -> str:
        """Of all that decides the result: the models, the recipe with what beats it, the method, the version of poise."""
        digest = hashlib.sha256()
        known = (poise.__version__, self.method.function.__qualname__, self.recipe.base, self.recipe.chat_template)
        for said in (*known, sorted(map(str, self.fixed.items()))):
            digest.update(f"{said}\0".encode())
        for parent in self.parents:
            digest.update(f"{parent.checkpoint.fingerprint()}\0".encode())
        for line in self.plan.lines:
            parts = [(part.parent, part.name) for part in line.inputs]
            digest.update(f"{line.name} {tuple(line.shape)} {line.dtype} {parts} {sorted(line.settings.items())}\0".encode())
        digest.update(self.side_files.digest().encode())
        for where in sorted({str(value) for line in self.plan.lines for value in self.besides(line)}):
            found = self.aside(where)
            digest.update((found.fingerprint() if isinstance(found, Checkpoint) else where).encode())
        return digest.hexdigest()

    def besides(self, line: Line) -> Iterator[Any]:
        for setting in self.method.beside & set(line.settings):
            yield from line.settings[setting]

    def aside(self, where: Any) -> Mapping[str, Tensor]:
        """What a setting names that stands beside a model: a file, or what `opened` has under that name."""
        if where not in self.beside:
            known = self.opened.get(Reference(str(where)))
            self.beside[where] = SecondMoments(place(str(where), self.recipe)) if known is None else known
        return self.beside[where]

    def read(self, part: Part, start: int, stop: int) -> Tensor:
        if part.rows is not None:
            return mapped_rows(self.parents, part.parent, part.name, part.rows, start, stop)
        return self.parents[part.parent].rows(part.name, start, stop)

    def taken(self, line: Line, start: int, stop: int) -> tuple[list[Tensor], Tensor | None, dict[str, Any]]:
        """Rows of all models, of the base, and the settings, in which what stands beside the models is rows too."""
        tensors = [self.read(part, start, stop) for part in line.parts]
        base = None if line.base is None else self.read(line.base, start, stop)
        if any(t.dtype == torch.float64 for t in (*tensors, *([] if base is None else [base]))):
            tensors, base = [t.double() for t in tensors], None if base is None else base.double()
        settings = dict(line.settings)
        for setting in self.method.beside & set(settings):
            found = [self.aside(where) for where in settings[setting]]
            settings[setting] = [
                wide(held.rows(part.name, start, stop) if isinstance(held, Checkpoint) else held[part.name][start:stop])
                for held, part in zip(found, line.parts, strict=True)
            ]
        return tensors, base, settings

    def place(self, line: Line, start: int) -> Place:
        return Place(line.name, line.shape, start, self.offsets[line.name] + start * line.shape[1:].numel(), line.layer)

    def observe(self, progress: Progress | None = None) -> None:
        """Show all rows of all tensors to the method's observer, as often as it wants."""
        kind = observer_of(self.method.function)
        if kind is None or not self.offsets:
            return
        counts = {len(self.lines[name].parts) for name in self.offsets}
        if len(counts) > 1:
            problem = f"{self.method.name} looks over the whole model, and needs as many sources in every slice"
            raise self.recipe.wrong("slices", problem)
        part = self.chosen.completed(self.recipe.slices[0])
        sources = [part.sources[i] for i in self.chosen.merged(part)]
        settings = self.chosen.at(part, sources, None, [""] * len(sources), 0.0)
        self.seen = build(kind, settings, self.method.function, counts.pop())
        total = kind.rounds * sum(self.lines[name].nbytes for name in self.offsets)
        done = 0
        for number in range(self.seen.rounds):
            for name in self.offsets:
                line = self.lines[name]
                for start, stop in tiles(line.shape):
                    tensors, base, own = self.taken(line, start, stop)
                    self.seen.see(number, self.place(line, start), tensors, base, own)
                    done += (stop - start) * line.shape[1:].numel() * line.dtype.itemsize
                    if progress is not None:
                        progress("observe", done, max(total, done))
            self.seen.close(number)

    def rows(self, planned: Planned, start: int, stop: int) -> Tensor:
        """Rows of the result."""
        line = self.lines[planned.name]
        if line.copied:
            part = line.parts[0]
            parent = self.parents[part.parent]
            return parent.checkpoint.rows(parent.names[part.name], start, stop)
        tensors, base, settings = self.taken(line, start, stop)
        if self.seen is not None:
            settings["seen"] = self.seen.answer(self.place(line, start))
        try:
            return self.method.function(tensors, base, **settings)
        except CheckpointError:
            raise
        except ValueError as error:
            raise ValueError(f"{line.name}: {error}") from error


def tile_rows(shape: torch.Size) -> int:
    return max(1, TILE // max(1, 4 * shape[1:].numel()))


def tiles(shape: torch.Size) -> Iterator[tuple[int, int]]:
    """Runs of rows that fit into a tile."""
    step, count = tile_rows(shape), count_rows(shape)
    for start in range(0, count, step):
        yield start, min(start + step, count)
