"""What the suite runs over: the catalog's optimizers, how each is built, and the file that holds its reference.

Entering the catalog is all it takes to be tested here. An entry whose source is `src/poise/optim/rules/lion.py` has its
reference in `tests/optim/rules/test_lion.py`, which may define:

    reference(params, grads, *, lr, **hyper)    the published formula in plain float64, by another hand than the rule: must
    CASES: list[dict]                           hyper-parameters under which the two are compared; default `[{}]`
    TYPICAL: dict                               hyper-parameters for all other behaviours (with state to keep); default `{}`
    TOLERANCE: float                            of the comparison; default 1e-10
    build(params, *, lr, **options)             how a transform becomes an optimizer; default: a chain of it alone

Where a file holds several entries, `reference_<name>`, `CASES_<name>` and so on come first, with "_" for "-".
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from poise.catalog import Method, methods
from poise.memory.codec import CODECS
from poise.optim import Optimizer, chain

from .problems import Grads, distance, draw, leaves, play

TESTS = Path(__file__).resolve().parents[1]
STATES = ("fp32", "bf16", "int8", "int4")
RATES = (1.0, 1.0, 0.9, 0.7, 0.5, 0.8, 0.3, 0.1)  # a schedule for the reference: it starts at the lr that was asked for

_loaded: dict[Path, ModuleType] = {}


def entries() -> list[Method]:
    """Everything in the catalog that is, or becomes, an optimizer."""
    return methods("optim")


def home(entry: Method) -> Path:
    """The test file that mirrors the source file of `entry`."""
    family, room, module = entry.target.__module__.rsplit(".", 3)[1:]
    return TESTS / family / room / f"test_{module}.py"


def told(entry: Method, what: str, default: Any = None) -> Any:
    """What the entry's own test file says under `what`, or `default`."""
    path = home(entry)
    if not path.exists():
        return default
    if path not in _loaded:
        spec = importlib.util.spec_from_file_location(f"home_of_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        _loaded[path] = module
    own = f"{what}_{entry.name}".replace("-", "_")
    return getattr(_loaded[path], own, getattr(_loaded[path], what, default))


def tolerance(entry: Method) -> float:
    """How far from its reference an entry may be."""
    return told(entry, "TOLERANCE", 1e-10)


def reference(entry: Method) -> Callable[..., list[Tensor]]:
    """The entry's float64 reference; fails with what to write where there is none."""
    found = told(entry, "reference")
    if found is None:
        raise AssertionError(
            f"{entry.name} ({entry.import_path}) has no reference: add to {home(entry).relative_to(TESTS.parent)} a function "
            "`reference(params, grads, *, lr, **hyper)` that returns the final weights in plain float64, written from the paper"
        )
    return found


def build(entry: Method, params: Any, *, lr: Any = 0.01, **options: Any) -> torch.optim.Optimizer:
    """The optimizer of `entry` over a module, parameters or groups, in its typical setting unless told otherwise."""
    return exactly(entry, params, **{"lr": lr, **told(entry, "TYPICAL", {}), **options})


def exactly(entry: Method, params: Any, *, target: Callable[..., Any] | None = None, **options: Any) -> torch.optim.Optimizer:
    """As `build`, but with the entry's own defaults, and with `target` in its place if one is given."""
    make = told(entry, "build")
    target = target or entry.target
    if make is not None:
        with standing_in(entry, target):
            return make(params, **options)
    if entry.kind == "transform":
        return Optimizer(params, chain(target()), **options)
    return target(params, **options)


def compare_with_reference(entry: Method, hyper: dict[str, Any], target: Callable[..., Any] | None = None) -> float:
    """Largest difference of `entry` (or of `target` in its place) to its reference, over a schedule and missing gradients."""
    start, grads = draw(steps=len(RATES), missing=[(0, 3), (2, 0), (5, 1), (5, 2)])
    params = leaves(start)
    found = play(exactly(entry, params, lr=0.01, target=target, backend="eager", **hyper), params, grads, RATES)
    return distance(found, reference(entry)(start, grads, lr=[0.01 * r for r in RATES], **hyper))


@contextmanager
def standing_in(entry: Method, target: Callable[..., Any]) -> Iterator[None]:
    """Within it, the entry's own test file finds `target` under the entry's name, so that its `build` builds with it."""
    module, name = _loaded[home(entry)], entry.target.__name__
    assert hasattr(module, name), f"`build` in {home(entry).name} must use {name} under that name"
    setattr(module, name, target)
    try:
        yield
    finally:
        setattr(module, name, entry.target)


def mutated(entry: Method) -> Callable[..., Any]:
    """The entry's class or function, from its source with its `mutant` applied; no registry hears of it."""
    assert entry.mutant is not None, (
        f"{entry.name} names no mutant: @method(..., mutant=(a piece of its source, what to put there))"
    )
    old, new = entry.mutant
    original = sys.modules[entry.target.__module__]
    source = without_catalog_lines(inspect.getsource(original))
    assert old in source, f"the mutant of {entry.name} replaces {old!r}, which does not stand in {original.__name__}"
    copy = ModuleType(f"{original.__name__}_mutant")
    copy.__package__ = original.__package__
    sys.modules[copy.__name__] = copy
    formats = dict(CODECS)  # where a codec's module enters it
    try:
        exec(compile(source.replace(old, new), f"<mutant of {entry.name}>", "exec"), copy.__dict__)
    finally:
        del sys.modules[copy.__name__]
        CODECS.clear()
        CODECS.update(formats)
    return getattr(copy, entry.target.__name__)


def without_catalog_lines(source: str) -> str:
    """`source` without its `@method(...)` decorators, in which the mutant itself stands too."""
    lines = source.splitlines()
    for node in ast.parse(source).body:
        for decorator in getattr(node, "decorator_list", []):
            if ast.unparse(decorator).startswith("method("):
                lines[decorator.lineno - 1 : decorator.end_lineno] = [""] * (decorator.end_lineno - decorator.lineno + 1)
    return "\n".join(lines)


def pace(entry: Method, rms: float, gradient: Tensor) -> float:
    """The lr at which a warmed-up rule moves `rms`, root mean square, a step along `gradient`: any rule at one pace."""
    params = leaves([torch.zeros_like(gradient)])
    opt = build(entry, params, lr=1e-3, backend="eager")
    before = play(opt, params, [[gradient]] * 11)
    after = play(opt, params, [[gradient]])
    moved = float((after[0] - before[0]).pow(2).mean().sqrt())
    assert moved > 0, f"{entry.name} does not move a matrix on its twelfth step"
    return 1e-3 * rms / moved


def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Sequential:
    """128 -> 64 -> 10. Its first matrix is large enough for every state format to encode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)).to(dtype)


def batch(size: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs and the classes a fixed random linear map puts them in."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 128, generator=generator)
    return x, (x @ torch.randn(128, 10, generator=torch.Generator().manual_seed(99))).argmax(1)


def loss_of(model: Callable[[Tensor], Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
    return torch.nn.functional.cross_entropy(model(data[0]).float(), data[1])


def grads_like(params: list[Any], steps: int, seed: int = 1) -> Grads:
    """Random gradients for parameters that are already there."""
    return draw([tuple(p.shape) for p in params], steps, seed=seed, dtype=torch.float32)[1]


def kept_for(optimizer: Any, p: Any) -> dict[str, Tensor]:
    """State of one parameter, copied, without what a link shares over all of them, which is kept with the first."""
    shared = {key for member in optimizer._current().members for key in member.shared}
    return {key: value.clone() for key, value in optimizer.state[p].items() if key not in shared}


def tensors_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor of the optimizer's `state_dict`, copied, under `parameter index/slot`."""
    state = optimizer.state_dict()["state"]
    return {f"{i}/{slot}": v.detach().clone() for i, slots in state.items() for slot, v in slots.items() if torch.is_tensor(v)}
