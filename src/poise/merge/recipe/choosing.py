"""A method and its settings at every tensor: what a recipe says of them, checked against what the method has."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .names import Resolved, checked
from .schema import Recipe, Setting, Slice, Source
from .settings import look_up

REQUIRED = inspect.Parameter.empty


class Chosen:
    """The method of a recipe.

    Args:
        fixed: settings that beat the recipe's.
    """

    def __init__(self, recipe: Recipe, method: Resolved, fixed: Mapping[str, Setting]) -> None:
        self.recipe, self.method, self.fixed = recipe, method, fixed

    def levels(self) -> Iterator[tuple[str, Mapping[str, Setting]]]:
        """Everywhere that settings stand, with what their names have before them in messages."""
        yield "--set ", self.fixed
        yield "parameters.", self.recipe.settings
        for part in self.recipe.slices:
            for level in (part, *part.sources):
                yield f"{level.where}.parameters.", level.settings

    def errors(self) -> Iterator[ValueError]:
        """One for each setting that the method does not have."""
        known = [*self.method.keys, *self.method.theirs.idle]
        for where, settings in self.levels():
            for key in settings:
                if key not in known:
                    near = difflib.get_close_matches(key, known, n=1)
                    hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(self.method.keys) or 'none'}"
                    yield self.recipe.wrong(f"{where}{key}", f"{self.method.name} has no such setting; {hint}")

    def notes(self) -> list[str]:
        """What is set and has no effect, and what is not set and comes out differently than with mergekit."""
        theirs = self.method.theirs
        said = {key for _, settings in self.levels() for key in settings}
        idle = [f"{key}: no effect here: {why}" for key, why in theirs.idle.items() if key in said]
        return idle + [f"{key}: {why}" for key, why in theirs.deviations.items() if key not in said]

    def completed(self, part: Slice) -> Slice:
        """A slice with the base among its sources where the method needs it and `models:` leaves it out.

        Raises:
            ValueError: no base, or no other model than the base.
        """
        base, method = part.base or self.recipe.base, self.method
        sources = list(part.sources)
        if base is None and method.base == "root" and method.theirs.needs_base:
            raise self.recipe.wrong("base_model", f"missing: {method.name} merges differences from it")
        if base is not None and method.base != "among" and base not in [source.model for source in sources]:
            if sources[0].layers is not None:
                problem = f"base_model {base} must be one of them, so that its layers are known"
                raise self.recipe.wrong(f"{part.where}.sources", problem)
            sources.append(Source(base))
        if method.base == "first":
            sources.sort(key=lambda source: source.model != base)  # stable
        if method.base == "root" and all(source.model == base for source in sources):
            raise self.recipe.wrong(part.where or "models", f"only the base; {method.name} needs at least one other model")
        return Slice(tuple(sources), part.settings, base, part.where)

    def merged(self, part: Slice) -> list[int]:
        """Places of the sources that are merged: all but the base that differences are taken from."""
        return [i for i, source in enumerate(part.sources) if self.method.base != "root" or source.model != part.base]

    def at(
        self, part: Slice, sources: Sequence[Source], name: str | None, names: Sequence[str], depth: float
    ) -> dict[str, Any]:
        """The method's settings for one tensor.

        Args:
            part: the slice of the result.
            sources: those that are merged.
            name: of the tensor; None: only what holds for every tensor.
            names: in each source.
            depth: see `settings.value_at`.
        """
        found: dict[str, Any] = dict(self.method.theirs.fixed)
        for setting in sorted(self.method.whole):
            if (one := self.value(setting, part, None, name, depth)) is not None:
                found[setting] = one
            elif name is not None and self.default(setting) is REQUIRED:
                raise self.recipe.wrong(f"parameters.{setting}", f"missing at {name}, and {self.method.name} has no default")
        for setting in sorted(self.method.each):
            own = [self.value(setting, part, s, n if name else None, depth) for s, n in zip(sources, names, strict=True)]
            default = self.default(setting)
            lacking = default is REQUIRED or setting in self.method.beside
            if (all(one is None for one in own) and default is not REQUIRED) or (name is None and lacking and None in own):
                continue
            for source, one in zip(sources, own, strict=True):
                if one is None and lacking:
                    problem = f"missing at {name}, and {self.method.name} needs it of every model"
                    raise self.recipe.wrong(f"{source.where}.parameters.{setting}", problem)
            found[setting] = tuple(default if one is None else one for one in own)
        return found

    def value(self, setting: str, part: Slice, source: Source | None, name: str | None, depth: float) -> Any:
        """A setting at the nearest level that has it; of several names for it, the method's own comes first."""
        levels = [self.fixed, *([source.settings] if source else []), part.settings, self.recipe.settings]
        for key, (ours, convert) in self.method.keys.items():
            if ours == setting and (raw := look_up(key, levels, name, depth)) is not None:
                return self.fit(key, raw, convert, source, part)
        return self.method.theirs.defaults.get(setting)

    def fit(self, key: str, raw: Any, convert: Callable[[Any], Any], source: Source | None, part: Slice) -> Any:
        try:
            return checked(convert(raw), self.method.types.get(self.method.keys[key][0]))
        except (ValueError, TypeError) as error:
            where = f"parameters.{key}"
            if key in self.fixed:
                where = f"--set {key}"
            elif source is not None and key in source.settings:
                where = f"{source.where}.{where}"
            elif key in part.settings:
                where = f"{part.where}.{where}"
            raise self.recipe.wrong(where, str(error)) from None

    def default(self, setting: str) -> Any:
        return inspect.signature(self.method.function).parameters[setting].default
