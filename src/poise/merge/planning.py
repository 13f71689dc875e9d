"""The first pass: from headers alone to one line for each tensor of the result, or to everything that is wrong.

Models must agree in names and shapes. What may differ is known and dealt with: a head that one stores and another ties, buffers that
old versions stored, vocabularies if the recipe names a tokenizer, layers where slices put them elsewhere.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from poise.checkpoint import CheckpointError

from .embeddings import RowMap
from .parents import BUFFERS, LAYERS, WIDTHS, Parent, Stack, is_before
from .recipe import Recipe, Slice, Source
from .recipe.names import Resolved, checked
from .recipe.settings import depth_of, look_up


@dataclass(frozen=True)
class Part:
    """Rows of one model that go into a tensor: of which, under which name, in which order."""

    parent: int
    name: str
    rows: RowMap | None = None


@dataclass(frozen=True)
class Line:
    """One tensor of the result.

    Attributes:
        parts: in the order of the recipe's models; one alone for what is copied.
        settings: the method's, for this tensor.
        copied: not merged: numbers that are not floating.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    parts: tuple[Part, ...]
    base: Part | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    layer: int | None = None
    copied: bool = False

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


@dataclass
class Plan:
    """All lines, in the order in which they are stored.

    Attributes:
        config: of the result; None where the models have none.
        errors: all that was found; with any, `lines` are not complete.
        notes: what the recipe says and is understood differently, or has no effect.
    """

    lines: list[Line] = field(default_factory=list)
    config: dict[str, Any] | None = None
    errors: list[ValueError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raise the first error, and say how many more there are."""
        if self.errors:
            first = self.errors[0]
            more = f" ({len(self.errors) - 1} more errors; `poise plan merge` lists them)" if len(self.errors) > 1 else ""
            first.args = (f"{first.args[0]}{more}",)
            raise first


class Planner:
    """Plans one recipe over opened models.

    Args:
        maps: of each model, how rows of its embedding become those of the result; None: as they are.
        common_rows: where vocabularies differ, take the rows that all have.
        dtype: of the result; None: each tensor in the dtype of the base, or of the first model.
        fixed: settings that beat the recipe's, in either language's names.
    """

    def __init__(
        self,
        recipe: Recipe,
        method: Resolved,
        parents: Sequence[Parent],
        *,
        maps: Sequence[RowMap] | None = None,
        common_rows: bool = False,
        dtype: torch.dtype | None = None,
        fixed: Mapping[str, Any] | None = None,
    ) -> None:
        self.recipe, self.method, self.parents = recipe, method, parents
        self.maps, self.common_rows, self.dtype, self.fixed = maps, common_rows, dtype, dict(fixed or {})
        self.number = {parent.reference: i for i, parent in enumerate(parents)}
        self.plan = Plan()
        self.alike: dict[str, int] = {}
        self.kinds: list[str | None] = []

    def __call__(self) -> Plan:
        try:
            self.vocabulary()
            self.method_fits()
            slices = [self.completed(part) for part in self.recipe.slices]
            if not self.plan.errors:
                self.lines(slices)
                self.whole_config(slices)
        except ValueError as error:
            self.plan.errors.append(error)
        return self.plan

    # What the recipe says of settings

    def vocabulary(self) -> None:
        """Refuse settings that the method does not have, and note those without effect."""
        idle = self.method.theirs.idle
        levels = [("parameters", self.recipe.settings), ("set", self.fixed)]
        for part in self.recipe.slices:
            levels.append((f"{part.where}.parameters", part.settings))
            levels += [(f"{source.where}.parameters", source.settings) for source in part.sources]
        for where, settings in levels:
            for key in settings:
                if key in idle:
                    note = f"{key}: no effect here: {idle[key]}"
                    if note not in self.plan.notes:
                        self.plan.notes.append(note)
                elif key not in self.method.keys:
                    near = difflib.get_close_matches(key, [*self.method.keys, *idle], n=1)
                    hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(self.method.keys) or 'none'}"
                    problem = f"{self.method.name} has no such setting; {hint}"
                    self.plan.errors.append(self.recipe.wrong(f"{where}.{key}", problem))
        if self.method.theirs.deviation:
            self.plan.notes.append(f"{self.method.name}: {self.method.theirs.deviation}")

    def method_fits(self) -> None:
        for parent in self.parents:
            if "quantization_config" in parent.checkpoint.config:
                cure = "take the model as it was before, or dequantize it"
                self.plan.errors.append(
                    CheckpointError("is quantized; its numbers cannot be averaged", cure=cure, file=str(parent))
                )

    def settings(self, part: Slice, sources: Sequence[Source], name: str | None, names: Sequence[str], depth: float) -> Any:
        """The method's settings for one tensor; None as `name`: what holds for every tensor."""
        method, found = self.method, dict(self.method.theirs.fixed)
        for setting in sorted(method.each | method.whole):
            keys = [(key, convert) for key, (ours, convert) in method.keys.items() if ours == setting]

            def value(source: Source | None, seen: str | None) -> Any:
                levels = [self.fixed, *([source.settings] if source else []), part.settings, self.recipe.settings]
                for key, convert in keys:  # noqa: B023 - called at once
                    if (raw := look_up(key, levels, seen, depth)) is not None:
                        try:
                            return checked(convert(raw), method.types.get(setting))  # noqa: B023
                        except (ValueError, TypeError) as error:
                            where = self.place_of(key, source, part)
                            raise self.recipe.wrong(where, str(error)) from None
                return method.theirs.defaults.get(setting)  # noqa: B023

            if setting in method.whole:
                single = value(None, name)
                if single is not None:
                    found[setting] = single
                continue
            values = [value(s, n if name is not None else None) for s, n in zip(sources, names, strict=True)]
            if all(one is None for one in values):
                continue
            default = self.default(setting)
            values = [default if one is None else one for one in values]
            for source, one in zip(sources, values, strict=True):
                if one is None and name is not None:
                    where = f"{source.where}.parameters.{setting}" if source.where else setting
                    raise self.recipe.wrong(where, f"missing for {name!r}, and {method.name} has no default for it")
            if None not in values:
                found[setting] = tuple(values)
        return found

    def place_of(self, key: str, source: Source | None, part: Slice) -> str:
        for where, settings in (("set", self.fixed), *([(f"{source.where}.parameters", source.settings)] if source else []),
                                (f"{part.where}.parameters", part.settings)):  # fmt: skip
            if key in settings:
                return f"{where}.{key}"
        return f"parameters.{key}"

    def default(self, setting: str) -> Any:
        import inspect

        found = inspect.signature(self.method.function).parameters[setting].default
        return None if found is inspect.Parameter.empty else found

    # Which layers of which models

    def completed(self, part: Slice) -> Slice:
        """A slice with the layers of every source, and with the base if the method needs it and `models:` leaves it out."""
        base = part.base or self.recipe.base
        role, sources = self.method.base, list(part.sources)
        if role == "root" and self.method.name in ("task_arithmetic", "ties") and base is None:
            raise self.recipe.wrong("base_model", f"missing: {self.method.name} merges differences from it")
        if base is not None and role != "among" and base not in [source.model for source in sources]:
            if sources[0].layers is not None:
                where = f"{part.where}.sources"
                raise self.recipe.wrong(where, f"base_model {base} must be one of them, so that its layers are known")
            sources.append(Source(base))
        if role == "first" and base is not None:
            sources.sort(key=lambda source: source.model != base)  # stable
        ranged = []
        for source in sources:
            parent = self.parents[self.number[source.model]]
            if source.layers is not None:
                count = self.stack(parent).count
                if source.layers[1] > count:
                    where = f"{source.where}.layer_range"
                    raise self.recipe.wrong(where, f"{list(source.layers)} is beyond the {count} layers of {parent}")
            ranged.append(source)
        if role == "root" and base is not None and all(source.model == base for source in ranged):
            where = part.where or "models"
            raise self.recipe.wrong(where, f"only the base; {self.method.name} needs at least one other model")
        return Slice(tuple(ranged), part.settings, base, part.where)

    def stack(self, parent: Parent) -> Stack:
        stacks = sorted(parent.stacks.values(), key=lambda stack: stack.prefix)
        if len(stacks) > 1:  # experts and heads are numbered too: the outermost run of most tensors is meant
            weight = {s: sum(name.startswith(s.prefix) for name in parent.names) for s in stacks}
            most = max(weight.values())
            if sorted(weight.values())[-2] * 4 > most:
                names = ", ".join(f"{s.prefix}* ({s.count})" for s in stacks)
                raise CheckpointError(f"has several runs of layers: {names}", cure="slices need one; use models:", file=str(parent))
            return max(stacks, key=lambda s: weight[s])
        if not stacks:
            raise CheckpointError("has no numbered layers", cure="slices need them; use models:", file=str(parent))
        return stacks[0]

    # Lines

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
            for offset in range(self.length(part)):
                self.layer(part, offset, place)
                place += 1
        after = [n for n in self.agreed(last, [n for n in self.frame(last).names if not self.in_stack(self.frame(last), n)])]
        for name in (n for n in after if not is_before(n)):
            self.add(last, name, [name] * len(last.sources))

    def frame(self, part: Slice) -> Parent:
        """The model whose names and shapes the others are held to: the base, or the first."""
        models = [source.model for source in part.sources]
        return self.parents[self.number[part.base if part.base in models and self.method.base != "among" else models[0]]]

    def in_stack(self, parent: Parent, name: str) -> bool:
        found = parent.layer(name)
        return found is not None and found[0] == self.stack(parent)

    @staticmethod
    def length(part: Slice) -> int:
        layers = part.sources[0].layers
        assert layers is not None
        return layers[1] - layers[0]

    def layer(self, part: Slice, offset: int, place: int) -> None:
        """Every tensor of layer `offset` of a slice, which is layer `place` of the result."""
        stacks = [self.stack(self.parents[self.number[source.model]]) for source in part.sources]
        starts = [
            f"{stack.prefix}{source.layers[0] + offset}."
            for stack, source in zip(stacks, part.sources, strict=True)
            if source.layers is not None
        ]
        main = [source.model for source in part.sources].index(self.frame(part).reference)
        inner = [name.removeprefix(starts[main]) for name in self.frame(part).names if name.startswith(starts[main])]
        depth = depth_of(offset, self.length(part))
        for rest in inner:
            self.add(part, f"{stacks[main].prefix}{place}.{rest}", [start + rest for start in starts], depth, place)
        for source, start in zip(part.sources, starts, strict=True):
            parent = self.parents[self.number[source.model]]
            for name in parent.names:
                if name.startswith(start) and name.removeprefix(start) not in inner and not BUFFERS.search(name):
                    self.missing(self.frame(part), parent, starts[main] + name.removeprefix(start))

    def agreed(self, part: Slice, names: Sequence[str]) -> Iterator[str]:
        """The frame's names, and heads that only others store; what the frame does not have is an error."""
        frame = self.frame(part)
        others = [self.parents[self.number[source.model]] for source in part.sources]
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
                    self.missing(frame, parent, name)

    def missing(self, lacking: Parent, having: Parent, name: str) -> None:
        """An error for a tensor that one model has and another has not; the tenth of one pair of models is not told any more."""
        pair = f"{lacking} {having}"
        self.alike[pair] = self.alike.get(pair, 0) + 1
        counts = [max((stack.count for stack in parent.stacks.values()), default=0) for parent in (lacking, having)]
        if having.by_token(name) and lacking.config.get("tie_word_embeddings") is False:
            cure = f"its config.json says tie_word_embeddings: false, yet {name} is not stored; correct the one or the other"
        elif counts[0] != counts[1]:
            cure = f"it has {counts[0]} layers, {having} has {counts[1]}; slices with layer_range merge layers of your choice"
        else:
            cure = "these are different architectures, or one was saved incompletely"
        if self.alike[pair] < 10:
            error = CheckpointError(f"is missing, and {having} has it", cure=cure, file=str(lacking), tensor=name)
            self.plan.errors.append(error)

    def add(self, part: Slice, name: str, names: Sequence[str], depth: float | None = None, place: int | None = None) -> None:
        """The line of one tensor."""
        frame = self.frame(part)
        for source, own in zip(part.sources, names, strict=True):
            parent = self.parents[self.number[source.model]]
            if own not in parent.names and not (frame.by_token(name) and parent.tie(own)):
                return self.missing(parent, frame, own)
        parts = [self.part(self.number[source.model], own) for source, own in zip(part.sources, names, strict=True)]
        main = [source.model for source in part.sources].index(frame.reference)
        info = frame.info(names[main])
        if not info.dtype.is_floating_point:
            line = Line(name, info.shape, info.dtype, (parts[main],), layer=place, copied=True)
            return self.plan.lines.append(line)
        if info.dtype.itemsize == 1:
            cure = "take the model as it was before, or dequantize it"
            error = CheckpointError(f"is stored in {info.dtype}", cure=cure, file=frame.file(names[main]), tensor=name)
            return self.plan.errors.append(error)
        shape = self.shape(part, name, parts, main)
        if shape is None:
            return None
        if depth is None:
            found = frame.layer(names[main])
            depth, place = (depth_of(found[1], found[0].count), found[1]) if found else (0.0, None)
        rooted = [
            j for j, source in enumerate(part.sources) if self.method.base == "root" and source.model == part.base
        ]
        kept = [j for j in range(len(parts)) if j not in rooted]
        try:
            settings = self.settings(part, [part.sources[j] for j in kept], name, [names[j] for j in kept], depth)
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
                self.differing(parts[main], p, name, want, found, by_token and found[1:] == want[1:])
                return None
        return want

    def differing(
        self, one: Part, other: Part, name: str, want: torch.Size, found: torch.Size, grown: bool
    ) -> None:
        first, second = self.parents[one.parent], self.parents[other.parent]
        causes = [
            f"{key} is {first.config[key]} and {second.config[key]}"
            for key in WIDTHS
            if key in first.config and key in second.config and first.config[key] != second.config[key]
        ]
        kind = f"{first} {second} {'vocabulary' if grown else causes}"
        self.alike[kind] = self.alike.get(kind, 0) + 1
        if self.alike[kind] > 1:
            return  # one cause is told once
        if grown:
            cure = (
                f"the vocabulary grew by {abs(found[0] - want[0])} tokens: tokenizer_source: union (or base) puts rows in order by"
                " their tokens, --common-rows keeps those that both have"
            )
        else:
            said = f": {', '.join(causes)}" if causes else ""
            cure = f"these are models of different sizes{said}; only models of one architecture can be merged"
        problem = f"{list(found)}, but {list(want)} in {first}"
        self.plan.errors.append(CheckpointError(problem, cure=cure, file=second.file(other.name), tensor=name))

    # config.json

    def whole_config(self, slices: Sequence[Slice]) -> None:
        """The frame's config with what the merge changed: layers, vocabulary, ties, dtype."""
        donor = self.parents[self.number[self.recipe.base]] if self.recipe.base else self.frame(slices[0])
        if not donor.checkpoint.config:
            return
        config = dict(donor.checkpoint.config)
        text = config["text_config"] = dict(config["text_config"]) if isinstance(config.get("text_config"), dict) else config
        if text is config:
            del config["text_config"]
        if slices[0].sources[0].layers is not None:
            self.layers_of(text, donor, slices)
        lines = {line.name: line for line in self.plan.lines}
        frame = self.frame(slices[0])
        if frame.embedding in lines and isinstance(text.get("vocab_size"), int):
            rows = lines[frame.embedding].shape[0]
            if rows != frame.vocabulary:
                text["vocab_size"] = rows
        head = any(name != frame.embedding and self.is_head(name) for name in lines)
        for holder in (config, text):
            if "tie_word_embeddings" in holder or (holder is config and head != self.untied(donor)):
                holder["tie_word_embeddings"] = not head
        if self.dtype is not None:
            key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
            config[key] = str(self.dtype).removeprefix("torch.")
        self.plan.config = config

    def is_head(self, name: str) -> bool:
        return any(name in p.names and len(p.shape(name)) == 2 and p.by_token(name) for p in self.parents)

    @staticmethod
    def untied(parent: Parent) -> bool:
        return any(n != parent.embedding and s == n and len(parent.shape(n)) == 2 and parent.by_token(n) for n, s in parent.names.items())

    def layers_of(self, config: dict[str, Any], donor: Parent, slices: Sequence[Slice]) -> None:
        """The number of layers, and whatever config lists one entry of for each."""
        had = self.stack(donor).count
        total = sum(self.length(part) for part in slices)
        for key in LAYERS:
            if config.get(key) == had:
                config[key] = total
        for key, value in config.items():
            if isinstance(value, list) and len(value) == had and "layer" in key:
                picked = []
                for part in slices:
                    source = part.sources[0]
                    own = self.parents[self.number[source.model]].config.get(key, value)
                    assert source.layers is not None
                    picked += own[source.layers[0] : source.layers[1]]
                config[key] = picked
