"""The first pass: from headers alone to one line for each tensor of the result, or to everything that is wrong.

Models must agree in names and shapes. What may differ is known and dealt with: a head that one stores and another ties, buffers
that old versions stored, vocabularies if the recipe names a tokenizer, layers where slices put them elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from poise.checkpoint import CheckpointError

from .differences import Differences
from .embeddings import RowMap
from .parents import BUFFERS, Parent, is_before
from .plan import Line, Part, Plan
from .recipe import Reference, Slice
from .recipe.choosing import Chosen
from .recipe.settings import depth_of
from .result_config import result_config


class Planner:
    """Plans one recipe over opened models.

    Args:
        chosen: the recipe's method and settings.
        maps: of each model, how rows of its embedding become those of the result; None: as they are.
        common_rows: where vocabularies differ, take the rows that all have.
        dtype: of the result; None: each tensor in the dtype of the base, or of the first model.
    """

    def __init__(
        self,
        chosen: Chosen,
        parents: Sequence[Parent],
        *,
        maps: Sequence[RowMap] | None = None,
        common_rows: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.chosen, self.recipe, self.parents = chosen, chosen.recipe, parents
        self.maps, self.common_rows, self.dtype = maps, common_rows, dtype
        self.number = {parent.reference: i for i, parent in enumerate(parents)}
        self.plan = Plan()
        self.differences = Differences(self.plan.errors)

    def __call__(self) -> Plan:
        self.plan.errors += self.chosen.errors()
        self.plan.notes += self.chosen.notes()
        for parent in self.parents:
            if "quantization_config" in parent.checkpoint.config:
                self.quantized(str(parent), "is quantized; its numbers cannot be averaged")
        try:
            slices = [self.ranged(self.chosen.completed(part)) for part in self.recipe.slices]
            if not self.plan.errors:
                self.lines(slices)
                donor = self.of(self.recipe.base) if self.recipe.base else self.frame(slices[0])
                sources = [[self.of(source.model) for source in part.sources] for part in slices]
                self.plan.config = result_config(self.plan.lines, slices, donor, self.frame(slices[0]), sources)
        except ValueError as error:
            self.plan.errors.append(error)
        return self.plan

    def of(self, model: Reference) -> Parent:
        return self.parents[self.number[model]]

    def quantized(self, file: str, problem: str, tensor: str | None = None) -> None:
        cure = "take the model as it was before, or dequantize it"
        self.plan.errors.append(CheckpointError(problem, cure=cure, file=file, tensor=tensor))

    def ranged(self, part: Slice) -> Slice:
        """The slice, whose layers all models have."""
        for source in part.sources:
            if source.layers is not None and source.layers[1] > (count := self.of(source.model).stack.count):
                problem = f"{list(source.layers)} is beyond the {count} layers of {source.model}"
                raise self.recipe.wrong(f"{source.where}.layer_range", problem)
        return part

    def lines(self, slices: Sequence[Slice]) -> None:
        sliced = slices[0].sources[0].layers is not None
        first, last = slices[0], slices[-1]
        frame = self.frame(first)
        inside = {n for n in frame.names if sliced and self.in_stack(frame, n)}
        outside = [n for n in self.agreed(first, [n for n in frame.names if n not in inside]) if n not in inside]
        before = [n for n in outside if is_before(n)]
        for name in before if sliced else outside:
            self.add(first, name, [name] * len(first.sources))
        if not sliced:
            return
        place = 0
        for part in slices:
            for offset in range(part.length):
                self.layer(part, offset, place)
                place += 1
        ending = self.frame(last)
        for name in list(self.agreed(last, [n for n in ending.names if not self.in_stack(ending, n)])):
            if not is_before(name):
                self.add(last, name, [name] * len(last.sources))

    def frame(self, part: Slice) -> Parent:
        """The model whose names and shapes the others are held to: the base, or the first."""
        models = [source.model for source in part.sources]
        return self.of(part.base if part.base in models and self.chosen.method.base != "among" else models[0])

    def in_stack(self, parent: Parent, name: str) -> bool:
        found = parent.layer(name)
        return found is not None and found[0] == parent.stack

    def layer(self, part: Slice, offset: int, place: int) -> None:
        """Every tensor of layer `offset` of a slice, which is layer `place` of the result."""
        stacks = [self.of(source.model).stack for source in part.sources]
        starts = [
            f"{stack.prefix}{source.layers[0] + offset}."
            for stack, source in zip(stacks, part.sources, strict=True)
            if source.layers is not None
        ]
        main = [source.model for source in part.sources].index(self.frame(part).reference)
        inner = [name.removeprefix(starts[main]) for name in self.frame(part).names if name.startswith(starts[main])]
        depth = depth_of(offset, part.length)
        for rest in inner:
            self.add(part, f"{stacks[main].prefix}{place}.{rest}", [start + rest for start in starts], depth, place)
        for source, start in zip(part.sources, starts, strict=True):
            parent = self.of(source.model)
            for name in parent.names:
                if name.startswith(start) and name.removeprefix(start) not in inner and not BUFFERS.search(name):
                    self.differences.missing(self.frame(part), parent, starts[main] + name.removeprefix(start))

    def agreed(self, part: Slice, names: Sequence[str]) -> Iterator[str]:
        """The frame's names, and heads that only others store; what the frame does not have is an error."""
        frame = self.frame(part)
        others = [self.of(source.model) for source in part.sources]
        for name in names:
            if BUFFERS.search(name) and not all(name in parent.names for parent in others):
                continue
            if all(parent.names.get(name, name) != name for parent in others):
                continue  # tied in all: stored once, under the other name
            yield name
        sliced = part.sources[0].layers is not None
        for parent in others:
            for name in parent.names:
                if name in frame.names or BUFFERS.search(name) or (sliced and self.in_stack(parent, name)):
                    continue
                if parent.by_token(name) and frame.tie(name):
                    yield name
                elif parent.names[name] == name:
                    self.differences.missing(frame, parent, name)

    def add(self, part: Slice, name: str, names: Sequence[str], depth: float | None = None, place: int | None = None) -> None:
        """The line of one tensor."""
        frame = self.frame(part)
        for source, own in zip(part.sources, names, strict=True):
            parent = self.of(source.model)
            if own not in parent.names and not (frame.by_token(name) and parent.tie(own)):
                return self.differences.missing(parent, frame, own)
        parts = [self.part(self.number[source.model], own) for source, own in zip(part.sources, names, strict=True)]
        main = [source.model for source in part.sources].index(frame.reference)
        info = frame.info(names[main])
        if not info.dtype.is_floating_point:
            line = Line(name, info.shape, info.dtype, (parts[main],), layer=place, copied=True)
            return self.plan.lines.append(line)
        if info.dtype.itemsize == 1:
            return self.quantized(str(frame.file(names[main])), f"is stored in {info.dtype}", name)
        shape = self.shape(part, name, parts, main)
        if shape is None:
            return None
        if depth is None:
            found = frame.layer(names[main])
            depth, place = (depth_of(found[1], found[0].count), found[1]) if found else (0.0, None)
        kept = self.chosen.merged(part)
        rooted = [j for j in range(len(parts)) if j not in kept]
        try:
            settings = self.chosen.at(part, [part.sources[j] for j in kept], name, [names[j] for j in kept], depth)
        except ValueError as error:
            if str(error) not in map(str, self.plan.errors):
                self.plan.errors.append(error)
            return None
        base = parts[rooted[0]] if rooted else None
        line = Line(name, shape, self.dtype or info.dtype, tuple(parts[j] for j in kept), base, settings, place)
        return self.plan.lines.append(line)

    def part(self, number: int, name: str) -> Part:
        mapped = None
        if self.maps is not None and self.parents[number].by_token(name):
            same = self.maps[number].identity and len(self.maps[number].own) == self.parents[number].vocabulary
            mapped = None if same else self.maps[number]
        return Part(number, name, mapped)

    def shape(self, part: Slice, name: str, parts: Sequence[Part], main: int) -> torch.Size | None:
        """The shape that all models give this tensor; None, and an error, if they do not."""
        shapes = [self.parents[p.parent].shape(p.name) for p in parts]
        shapes = [s if p.rows is None else torch.Size([len(p.rows.own), *s[1:]]) for s, p in zip(shapes, parts, strict=True)]
        want = shapes[main]
        by_token = all(self.parents[p.parent].by_token(p.name) for p in parts)
        if by_token and self.common_rows and len({s[1:] for s in shapes}) == 1:
            return torch.Size([min(s[0] for s in shapes), *want[1:]])
        for found, p in zip(shapes, parts, strict=True):
            if found != want:
                first, second = self.parents[parts[main].parent], self.parents[p.parent]
                grown = by_token and found[1:] == want[1:]
                self.differences.shape(first, second, name, want, found, p.name, grown)
                return None
        return want
