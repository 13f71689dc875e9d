"""What a merge method is: one typed function over the same rows of the same tensor of every model.

    @method("linear", family="merge", kind="merge", paper=...)
    def linear(tensors: list[Tensor], base: Tensor | None, *, weight: Each[float] = 1.0, normalize: bool = True) -> Tensor: ...

It gets rows in float32 (float64 where a model stores that), in the order of the recipe's models, and returns the merged rows;
what it is given it may not change. Its keyword arguments are its settings: names, types and defaults are read off the
signature, and `Each[...]` marks those that every model has its own value of, which come as a tuple.

What a method must know of whole tensors or of the whole model, a threshold or an angle, it does not compute from rows: it
declares an `Observer`, whose answer comes back as the keyword argument `seen`.

    @observed(TrimThresholds)
    def ties(tensors, base, *, seen: Trim, density: Each[float] = 0.2, ...) -> Tensor: ...

What stands beside each model with the same names and shapes, second moments say, is a setting marked `Beside`: given as one
mapping for each model, it comes, to observers too, as a list of the same rows as those of the models.

So every method runs a few rows at a time, and memory does not grow with tensors, nor with the model.
"""

from __future__ import annotations

import inspect
import typing
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Tensor])

PER_MODEL = "one for each model"
Each = Annotated[T | tuple[T, ...], PER_MODEL]

BESIDE = "a mapping beside each model"
Beside = Annotated[list[Tensor], BESIDE]


@dataclass(frozen=True)
class Place:
    """Where rows are from.

    Attributes:
        name: of the tensor.
        shape: of the whole tensor.
        start: of the first row.
        offset: entries of the whole model before the first of these rows, tensors in sorted order of their names.
        layer: number of the layer, None outside of layers.
    """

    name: str
    shape: torch.Size
    start: int = 0
    offset: int = 0
    layer: int | None = None

    @property
    def per_row(self) -> int:
        """Entries of one row."""
        return self.shape[1:].numel()


class Observer(Generic[T]):
    """Looks at all rows of all tensors, as often as it has rounds, before the first is merged.

    It is built with the settings of the method that have the names of its `__init__`'s arguments; those that are `Each` as
    tuples. Rows come tensor by tensor in sorted order of names, and in order within a tensor, in every round alike; `settings`
    are the method's at this tensor (a recipe may vary them by tensor). What it keeps must not grow with the model's entries.
    """

    rounds: int = 1

    @abstractmethod
    def see(
        self, round: int, place: Place, tensors: Sequence[Tensor], base: Tensor | None, settings: Mapping[str, Any]
    ) -> None:
        """Take in rows of one tensor."""

    def close(self, round: int) -> None:
        """A round is over."""

    @abstractmethod
    def answer(self, place: Place) -> T:
        """What the method is given as `seen` with these rows. Rows of a tensor are asked for in order."""


def observed(observer: type[Observer[Any]]) -> Callable[[F], F]:
    """Declare what a method must see of the whole before it can merge rows."""

    def mark(function: F) -> F:
        vars(function)["observer"] = observer
        return function

    return mark


def observer_of(function: Callable[..., Tensor]) -> type[Observer[Any]] | None:
    return getattr(function, "observer", None)


def besides(function: Callable[..., Tensor]) -> tuple[str, ...]:
    """Names of the settings that stand beside each model."""
    hints = typing.get_type_hints(function, include_extras=True)
    return tuple(name for name, hint in hints.items() if BESIDE in _marks(hint))


def _marks(hint: Any) -> tuple[Any, ...]:
    """What a hint is annotated with, an optional one too."""
    own = getattr(hint, "__metadata__", ())
    return own + tuple(mark for part in typing.get_args(hint) for mark in getattr(part, "__metadata__", ()))


def merge_tensors(
    function: Callable[..., Tensor],
    models: Sequence[Mapping[str, Tensor]],
    base: Mapping[str, Tensor] | None = None,
    **settings: Any,
) -> dict[str, Tensor]:
    """Merge state dicts in memory, every tensor whole: what the passes do on disk a few rows at a time.

    Floating tensors are merged in float32, or float64, and cast to the base's dtype, or the first model's without a base;
    others are taken from there. A setting given as a tuple holds one value for each model.

    Raises:
        ValueError: no model; models that differ in names or shapes, with the first that does.
    """
    if not models:
        raise ValueError("models: at least one is needed")
    first = models[0] if base is None else base
    beside = {name: settings.pop(name) for name in besides(function) if settings.get(name) is not None}
    names = sorted(first)
    for number, model in enumerate(models):
        _alike(f"model {number}", model, first, names)
    floating = [name for name in names if first[name].is_floating_point()]
    for name, mappings in beside.items():
        if len(mappings) != len(models):
            raise ValueError(f"{name}: {len(mappings)} mappings, but {len(models)} models; there must be one for each")
        for number, mapping in enumerate(mappings):
            _alike(f"{name} of model {number}", mapping, first, floating)

    def given(name: str) -> dict[str, Any]:
        return {**settings, **{key: [wide(one[name]) for one in mappings] for key, mappings in beside.items()}}

    seen = _observe(function, models, base, floating, settings, given)
    merged: dict[str, Tensor] = {}
    for place in _places(first, floating):
        rows, root = _taken(models, base, place.name)
        extra = {} if seen is None else {"seen": seen.answer(place)}
        merged[place.name] = function(rows, root, **given(place.name), **extra).to(first[place.name].dtype)
    return {name: merged[name] if name in merged else first[name].clone() for name in first}


def _alike(who: str, model: Mapping[str, Tensor], first: Mapping[str, Tensor], names: Sequence[str]) -> None:
    for name in names:
        if name not in model:
            raise ValueError(f"{who}: tensor {name!r} is missing")
        if model[name].shape != first[name].shape:
            raise ValueError(f"{who}: tensor {name!r} is {tuple(model[name].shape)}, not {tuple(first[name].shape)}")
    if unknown := sorted(set(model) - set(first)):
        raise ValueError(f"{who}: tensor {unknown[0]!r} is unknown to the others")


def _observe(
    function: Any, models: Any, base: Any, floating: Sequence[str], settings: Mapping[str, Any], given: Callable[[str], Any]
) -> Any:
    kind = observer_of(function)
    if kind is None:
        return None
    seen = build(kind, settings, function, len(models))
    for number in range(seen.rounds):
        for place in _places(models[0] if base is None else base, floating):
            seen.see(number, place, *_taken(models, base, place.name), given(place.name))
        seen.close(number)
    return seen


def _places(first: Mapping[str, Tensor], names: Sequence[str]) -> Iterator[Place]:
    offset = 0
    for name in names:
        yield Place(name, first[name].shape, 0, offset, layer_of(name))
        offset += first[name].numel()


def layer_of(name: str) -> int | None:
    """The first number among the parts of a name: `model.layers.3.mlp.weight` is of layer 3."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _taken(
    models: Sequence[Mapping[str, Tensor]], base: Mapping[str, Tensor] | None, name: str
) -> tuple[list[Tensor], Tensor | None]:
    return [wide(model[name]) for model in models], None if base is None else wide(base[name])


def wide(t: Tensor) -> Tensor:
    """In the dtype that is computed in: float64 if it is that, else float32."""
    return t if t.dtype == torch.float64 else t.float()


def build(kind: type[Observer[Any]], settings: Mapping[str, Any], function: Callable[..., Tensor], count: int) -> Observer[Any]:
    """An observer, with those of a method's settings, or of their defaults, that it asks for, and `count` models."""
    asked = inspect.signature(kind).parameters
    defaults = {n: p.default for n, p in inspect.signature(function).parameters.items() if p.default is not p.empty}
    known = {**defaults, **settings, "count": count}
    return kind(**{name: known[name] for name in asked if name in known})
