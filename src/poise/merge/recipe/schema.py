"""A recipe, read: which models, which layers of them, by which method, with which settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Value = bool | int | float | str


@dataclass(frozen=True)
class Reference:
    """A model as a recipe names it: a path, or `path+adapter` for a model with a LoRA folded into it."""

    path: str
    adapter: str | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        parts = text.split("+")
        if len(parts) > 2 or not all(parts):
            raise ValueError(f"{text!r} must be a path, or path+adapter")
        return cls(*parts)

    def __str__(self) -> str:
        return self.path if self.adapter is None else f"{self.path}+{self.adapter}"


@dataclass(frozen=True)
class Case:
    """One line of a setting that differs by tensor: `value` where the name holds `filter`, everywhere if that is None."""

    value: Value | tuple[Value, ...]
    filter: str | None = None


# A value; a gradient over the layers; cases of which the first that fits holds.
Setting = Value | tuple[Value, ...] | tuple[Case, ...]
Settings = Mapping[str, Setting]


@dataclass(frozen=True)
class Source:
    """Layers [first, last) of a model; None: all of them. `where` is the place in the recipe."""

    model: Reference
    layers: tuple[int, int] | None = None
    settings: Settings = field(default_factory=dict)
    where: str = ""


@dataclass(frozen=True)
class Slice:
    """Layers of the result, one after another, each merged from one layer of every source."""

    sources: tuple[Source, ...]
    settings: Settings = field(default_factory=dict)
    base: Reference | None = None
    where: str = ""

    @property
    def length(self) -> int:
        """How many layers of the result it makes; only of slices."""
        layers = self.sources[0].layers
        assert layers is not None
        return layers[1] - layers[0]


@dataclass(frozen=True)
class Token:
    """Where the embedding of a token comes from, for models that lack the token, or with `force` for all.

    Attributes:
        model: None: zeros.
        token: of that model: its text or its number; None: the token itself.
    """

    model: Reference | None = None
    token: str | int | None = None
    force: bool = False


@dataclass(frozen=True)
class Tokenizer:
    """Whose vocabulary the result has: "union", "base" or a model's."""

    source: str | Reference = "union"
    tokens: Mapping[str, Token] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None


@dataclass(frozen=True)
class Recipe:
    """What `read` returns and `poise.merge.run` carries out.

    Attributes:
        method: as the recipe names it; `names.resolve` finds the function.
        slices: one for `models:`, whose layers are then not counted yet.
        text: as it stands in the file; it is written beside the result.
        places: line of every key, for messages; `file` is what they call the recipe.
        own: built in Python, with poise's names and defaults and not mergekit's.
    """

    method: str
    slices: tuple[Slice, ...]
    base: Reference | None = None
    settings: Settings = field(default_factory=dict)
    dtype: str | None = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    text: str = ""
    own: bool = False
    file: str = field(default="", compare=False)
    places: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)

    def wrong(self, where: str, problem: str) -> ValueError:
        """An error that names the key, and its line where there is one."""
        line = self.places.get(where)
        file = [] if not self.file else [self.file if line is None else f"{self.file}:{line}"]
        return ValueError(": ".join([*file, *([where] if where else []), problem]))

    @property
    def models(self) -> tuple[Reference, ...]:
        """Every model once, the base first, then in the order of the recipe."""
        named = [source.model for part in self.slices for source in part.sources]
        bases = [base for base in (self.base, *(part.base for part in self.slices)) if base is not None]
        tokens = [] if self.tokenizer is None else [t.model for t in self.tokenizer.tokens.values() if t.model is not None]
        given = [self.tokenizer.source] if self.tokenizer and isinstance(self.tokenizer.source, Reference) else []
        return tuple(dict.fromkeys([*bases, *named, *given, *tokens]))
