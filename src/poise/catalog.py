"""Every method of poise by name: its family, its paper, how to build it, what to tune.

The catalog knows no method. A method enters itself, with the decorator that stands on it:

    @method("lion", family="optim",
            paper=Paper("Symbolic Discovery of Optimization Algorithms", arxiv="2302.06675", year=2023),
            tune={"lr": log_uniform(1e-5, 1e-2), "weight_decay": log_uniform(1e-3, 1.0)},
            mutant=("torch.sign(c)", "c"))
    class Lion(Optimizer): ...

The command line, the documentation, the comparison and the conformance tests all iterate what `methods()` returns.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

# The packages in which methods live, by family. A family without a package yet has no line here.
ROOMS: dict[str, tuple[str, ...]] = {
    "optim": ("poise.optim.rules", "poise.optim.transforms"),
    "training": tuple(f"poise.training.{room}" for room in ("drivers", "implicit", "layers", "losses", "solvers", "symmetry")),
    "memory": ("poise.memory",),
    "linalg": ("poise.linalg", "poise.linalg.solvers"),
    "merge": ("poise.merge.methods",),
    "adapt": ("poise.adapt.methods",),
    "compare": ("poise.compare.protocols",),
}
NEEDS_EXTRA = {"compare"}  # rooms that the core dependencies do not open; without the extra their methods are not listed

T = TypeVar("T", bound=Callable[..., Any])


@dataclass(frozen=True)
class Paper:
    """Where a method comes from. `title` is the paper's exact title; a method without a paper names its origin there."""

    title: str
    arxiv: str | None = None
    year: int | None = None
    url: str | None = None


@dataclass(frozen=True)
class Space:
    """One hyper-parameter's range: what `poise compare` draws from, and whose edges it flags."""

    kind: Literal["log_uniform", "uniform", "choice"]
    low: float = 0.0
    high: float = 0.0
    options: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        if self.kind == "choice":
            if not self.options:
                raise ValueError("choice(): at least one option is needed")
            return
        if not self.low < self.high:
            raise ValueError(f"{self.kind}(low={self.low}, high={self.high}): low must be below high")
        if self.kind == "log_uniform" and self.low <= 0:
            raise ValueError(f"log_uniform(low={self.low}): low must be positive")


def log_uniform(low: float, high: float) -> Space:
    """Uniform in the logarithm between `low` and `high`, both positive."""
    return Space("log_uniform", low, high)


def uniform(low: float, high: float) -> Space:
    """Uniform between `low` and `high`."""
    return Space("uniform", low, high)


def choice(*options: Any) -> Space:
    """One of `options`, each equally likely."""
    return Space("choice", options=options)


@dataclass(frozen=True)
class Method:
    """One line of the catalog."""

    name: str
    family: str
    paper: Paper
    target: Callable[..., Any]  # the class or function that the decorator stands on
    kind: str = "optimizer"  # within its family: optimizer, transform, driver, solver, codec, diagnostic, protocol, ...
    tune: Mapping[str, Space] = field(default_factory=dict)
    mutant: tuple[str, str] | None = None  # (a piece of the method's source, what to put there): its own test must then fail
    exempt: Mapping[str, str] = field(default_factory=dict)  # behaviour of the conformance suite -> the written reason

    @property
    def summary(self) -> str:
        """The first line of the method's docstring."""
        return (inspect.getdoc(self.target) or "").split("\n", 1)[0]

    @property
    def import_path(self) -> str:
        return f"{self.target.__module__}.{self.target.__qualname__}"

    def build(self, *args: Any, **hyper: Any) -> Any:
        """Call the method: for an optimizer `build(model_or_params, lr=..., state="int8", ...)`."""
        return self.target(*args, **hyper)

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "family": self.family,
            "kind": self.kind,
            "paper": self.paper.title,
            "arxiv": self.paper.arxiv,
            "year": self.paper.year,
            "summary": self.summary,
            "import_path": self.import_path,
        }


_methods: dict[str, Method] = {}


def method(
    name: str,
    *,
    family: str,
    paper: Paper,
    kind: str = "optimizer",
    tune: Mapping[str, Space] | None = None,
    mutant: tuple[str, str] | None = None,
    exempt: Mapping[str, str] | None = None,
) -> Callable[[T], T]:
    """Enter the decorated class or function into the catalog under `name`."""

    def enter(target: T) -> T:
        known = _methods.get(name)
        if known is not None and known.import_path != f"{target.__module__}.{target.__qualname__}":
            raise ValueError(f"method name {name!r} is taken by {known.import_path}; choose another")
        _methods[name] = Method(name, family, paper, target, kind, dict(tune or {}), mutant, dict(exempt or {}))
        return target

    return enter


def modules(package: str) -> Iterator[str]:
    """Names of the modules directly inside `package`, without importing them."""
    found = importlib.import_module(package)
    for info in pkgutil.iter_modules(found.__path__):
        if not info.name.startswith("_"):
            yield f"{package}.{info.name}"


def methods(family: str | None = None) -> list[Method]:
    """All methods, or one family's, ordered by family and name. Imports the rooms it has to look into."""
    if family is not None and family not in ROOMS:
        raise ValueError(f"unknown family {family!r}; known: {', '.join(ROOMS)}")
    for room, packages in ROOMS.items():
        if family is None or family == room:
            try:
                for package in packages:
                    for name in modules(package):
                        importlib.import_module(name)
            except ModuleNotFoundError as error:
                if room not in NEEDS_EXTRA or (error.name or "").partition(".")[0] == "poise":
                    raise
    chosen = [m for m in _methods.values() if family is None or m.family == family]
    return sorted(chosen, key=lambda m: (m.family, m.name))


def get(name: str) -> Method:
    """The method called `name`, or ValueError with the nearest known names."""
    for family in ROOMS:  # one after another: the last ones are dear to open
        if name not in _methods:
            methods(family)
    if name not in _methods:
        import difflib

        near = difflib.get_close_matches(name, _methods, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else f"; known: {', '.join(sorted(_methods))}"
        raise ValueError(f"unknown method {name!r}{hint}")
    return _methods[name]


def resolve(name: str, packages: tuple[str, ...]) -> Any:
    """The class or function `name` out of the one module of `packages` whose file name says it: Lion -> lion.py.

    This is how `poise.optim.Lion` finds its file without importing Lion's neighbours. A name that no file name matches
    is looked for in all of them, and so is one whose file has a class of that name only (Teleport, teleport).
    """
    wanted = name.lower()
    paths = [path for package in packages for path in modules(package)]
    named = [path for path in paths if path.rsplit(".", 1)[1].replace("_", "") == wanted]
    for path in [*named, *(path for path in paths if path not in named)]:
        found = getattr(importlib.import_module(path), name, None)
        if found is not None and getattr(found, "__module__", path) == path:
            return found
    raise AttributeError(f"no {name!r} in {', '.join(packages)}")
