"""What mergekit calls its methods and their settings, and what they are called here. The one place that says so."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from torch import Tensor

from ..protocol import PER_MODEL, besides
from .passthrough import passthrough
from .schema import Value

# What the base model is to a method. "root": differences from it are merged, and it is not one of the models. "first": it is
# the first of them. "among": it is one of the models if the recipe lists it there, and else only gives config and tokenizer.
Role = Literal["root", "first", "among"]


@dataclass(frozen=True)
class Theirs:
    """A method of mergekit in poise's words.

    Attributes:
        method: its name here.
        settings: name there -> name here, where they differ; a pair holds the conversion of the value too.
        idle: name there -> why it changes nothing here.
        defaults: what mergekit takes where a recipe is silent and poise's own default is another, in names used here.
        fixed: settings that make the method here the one there.
        needs_base: whether a method of differences can do nothing without a base.
        deviations: setting here -> what comes out differently unless the recipe sets it.
    """

    method: str
    base: Role = "root"
    settings: Mapping[str, str | tuple[str, Callable[[Any], Any]]] = field(default_factory=dict)
    idle: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Value] = field(default_factory=dict)
    fixed: Mapping[str, Value] = field(default_factory=dict)
    needs_base: bool = True
    deviations: Mapping[str, str] = field(default_factory=dict)


MASK = {"int8_mask": "signs take no memory worth saving where rows are merged one tile at a time"}
LAMBDA = {"lambda": "lambda_"}


def agreeing(normalize: Any) -> str:
    """mergekit's `normalize`, of methods that elect signs: whether those that agree are averaged or summed."""
    return "mean" if normalize else "sum"


ELECTED = {**LAMBDA, "normalize": ("disjoint", agreeing)}
SCOPE = {"trim_scope": "thresholds are sought over the whole model, as in the paper; mergekit: trim_scope: tensor"}
DROPS = {"rescale": "survivors are divided by the density, as in the paper; mergekit: rescale: l1"}
STRAIGHT = {"vectors": "norms and biases are interpolated linearly; mergekit: vectors: slerp"}

# Where a recipe is silent, numbers are mergekit's; where the two compute differently, poise follows the paper, and says so.
THEIRS: dict[str, Theirs] = {
    "linear": Theirs("linear", base="among"),
    "slerp": Theirs("slerp", base="first", deviations=STRAIGHT),
    "passthrough": Theirs("passthrough", base="among"),
    "task_arithmetic": Theirs(
        "task_arithmetic",
        settings=LAMBDA,
        idle={**MASK, "density": "nothing is trimmed", "rescale": "nothing is dropped"},
    ),
    "ties": Theirs("ties", settings=ELECTED, idle=MASK, defaults={"density": 1.0}, deviations=SCOPE),
    "dare_linear": Theirs("dare_linear", settings=LAMBDA, idle=MASK, deviations=DROPS),
    "dare_ties": Theirs("dare_ties", settings=ELECTED, idle=MASK, defaults={"disjoint": "sum"}, deviations=DROPS),
}

OURS = {"ota": Theirs("ota", needs_base=False)}
OWN = {"passthrough": passthrough}
ABSENT = (
    "nuslerp", "multislerp", "karcher", "model_stock", "nearswap", "arcee_fusion", "sce", "breadcrumbs", "breadcrumbs_ties",
    "della", "della_linear", "ram", "ramplus_tl", "rectify_embed",
)  # fmt: skip


@dataclass(frozen=True)
class Resolved:
    """A method and what a recipe may say about it.

    Attributes:
        function: the method.
        each, whole: its settings with one value for each model, and with one for all.
        beside: those of `each` that name a checkpoint which lies beside the model.
        keys: what a recipe may write -> (setting, conversion).
    """

    name: str
    function: Callable[..., Tensor]
    base: Role
    each: frozenset[str]
    whole: frozenset[str]
    beside: frozenset[str]
    types: Mapping[str, Any]
    keys: Mapping[str, tuple[str, Callable[[Any], Any]]]
    theirs: Theirs


def resolve(name: str, function: Callable[..., Tensor] | None = None, *, own: bool = False) -> Resolved:
    """The method that a recipe means by `name`; a `function` is taken as it is, and with `own` poise's names and defaults hold.

    Raises:
        ValueError: for a method that poise does not have, by its name.
    """
    theirs = THEIRS.get(name) or OURS.get(name) or Theirs(name, needs_base=function is None)
    if own:
        theirs = Theirs(theirs.method, theirs.base, needs_base=theirs.needs_base)
    if function is None:
        function = find(name, theirs)
    hints = get_type_hints(function, include_extras=True)
    names = [n for n, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY and n != "seen"]
    each = frozenset(n for n in names if PER_MODEL in getattr(hints.get(n), "__metadata__", ()))
    beside = frozenset(besides(function))
    keys: dict[str, tuple[str, Callable[[Any], Any]]] = {n: (n, same) for n in names if n not in theirs.fixed}
    for there, here in theirs.settings.items():
        keys[there] = (here, same) if isinstance(here, str) else here
    return Resolved(name, function, theirs.base, each | beside, frozenset(names) - each - beside, beside, hints, keys, theirs)


def same(value: Any) -> Any:
    return value


def find(name: str, theirs: Theirs) -> Callable[..., Tensor]:
    from poise import catalog

    if theirs.method in OWN:
        return OWN[theirs.method]
    ours = {method.name: method.target for method in catalog.methods("merge") if method.kind == "merge"}
    if theirs.method in ours:
        return ours[theirs.method]
    known = sorted({*ours, *OWN, *(there for there, line in THEIRS.items() if line.method in ours)})
    if name in ABSENT:
        raise ValueError(f"merge_method: poise does not have {name!r}; it has {', '.join(known)}")
    near = difflib.get_close_matches(name, known, n=3)
    raise ValueError(
        f"merge_method: unknown method {name!r}; {'did you mean' if near else 'known:'} {', '.join(near or known)}"
    )


def checked(value: Any, kind: Any) -> Any:
    """A value as the type hint of its setting wants it: what YAML and arithmetic over layers give is only nearly that.

    Raises:
        ValueError: saying what is allowed.
    """
    if PER_MODEL in getattr(kind, "__metadata__", ()):
        kind = get_args(get_args(kind)[0])[0]
    kinds = (kind,) if get_origin(kind) is Literal else get_args(kind) or (kind,)
    words = [word for one in kinds if get_origin(one) is Literal for word in get_args(one)]
    if isinstance(value, str) and value in words:
        return value
    if bool in kinds and (isinstance(value, bool) or value in (0, 1)):
        return bool(value)
    if int in kinds and type(value) is int:
        return value
    if float in kinds and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if str in kinds and isinstance(value, str):
        return value
    allowed = [f"one of {', '.join(map(repr, words))}"] if words else []
    allowed += [known.__name__ for known in (bool, int, float, str) if known in kinds]
    if allowed:
        raise ValueError(f"{value!r} must be {' or '.join(allowed)}")
    return value
