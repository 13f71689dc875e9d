"""State dicts to merge, and merging them a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from poise.merge.protocol import Place, besides, build, layer_of, observer_of, wide

SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (11, 6),
    "layers.0.conv.weight": (5, 3, 2, 2),
    "layers.0.norm.weight": (7,),
    "layers.1.proj.weight": (9, 13),
    "layers.1.scale": (),
    "none": (0, 4),
}

State = dict[str, Tensor]


def draw(seed: int, around: State | None = None, size: float = 1.0, dtype: torch.dtype = torch.float32) -> State:
    """Random tensors of `SHAPES`, or `around` plus a random step; with an integer and a boolean one."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in SHAPES.items():
        step = size * torch.randn(shape, generator=generator, dtype=torch.float64)
        found[name] = (step if around is None else around[name].double() + step).to(dtype)
    return {**found, "steps": torch.tensor(seed), "used": torch.tensor([True, False])}


def family(count: int, dtype: torch.dtype = torch.float32) -> tuple[State, list[State]]:
    """A base, and models that were fine-tuned from it."""
    base = draw(0, dtype=dtype)
    return base, [draw(seed, base, 0.1, dtype) for seed in range(1, count + 1)]


def moments(count: int) -> list[State]:
    """Second moments for each model of a family, small and of many sizes."""
    return [
        {name: (3 * t).exp() * 1e-8 for name, t in draw(100 + number).items() if t.is_floating_point()}
        for number in range(count)
    ]


def pieces(shape: torch.Size, sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Rows from start to stop, of these sizes in turn."""
    start, number, high = 0, 0, shape[0] if shape else 1
    while start < high:
        stop = min(high, start + sizes[number % len(sizes)])
        yield start, stop
        start, number = stop, number + 1


def merge_cut(
    function: Callable[..., Tensor],
    models: Sequence[Mapping[str, Tensor]],
    base: Mapping[str, Tensor] | None = None,
    sizes: Sequence[int] = (1, 3, 2),
    backwards: bool = False,
    **settings: Any,
) -> State:
    """As `merge_tensors`, in rows of these sizes; written in the opposite order of tensors if `backwards`."""
    first = models[0] if base is None else base
    beside = {name: settings.pop(name) for name in besides(function) if name in settings}
    names = [name for name in sorted(first) if first[name].is_floating_point()]
    offsets, offset = {}, 0
    for name in names:
        offsets[name], offset = offset, offset + first[name].numel()

    def at(name: str) -> Iterator[tuple[Place, dict[str, Any], list[Tensor], Tensor | None]]:
        shape = first[name].shape
        for start, stop in pieces(shape, sizes):

            def taken(t: Tensor, start: int = start, stop: int = stop) -> Tensor:
                return wide(t[start:stop] if t.ndim else t)

            place = Place(name, shape, start, offsets[name] + start * shape[1:].numel(), layer_of(name))
            given = {**settings, **{key: [taken(one[name]) for one in mappings] for key, mappings in beside.items()}}
            yield place, given, [taken(m[name]) for m in models], None if base is None else taken(base[name])

    kind = observer_of(function)
    seen = None if kind is None else build(kind, settings, function, len(models))
    for number in range(0 if seen is None else seen.rounds):
        assert seen is not None
        for name in names:
            for place, given, rows, root in at(name):
                seen.see(number, place, rows, root, given)
        seen.close(number)
    found = {name: t.clone() for name, t in first.items()}
    for name in reversed(names) if backwards else names:
        parts = []
        for place, given, rows, root in at(name):
            extra = {} if seen is None else {"seen": seen.answer(place)}
            parts.append(function(rows, root, **given, **extra))
        if parts:
            whole = torch.cat(parts) if first[name].ndim else parts[0]
            found[name] = whole.to(first[name].dtype)
    return found


def total(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).sum(0)


def largest_gap(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    assert set(a) == set(b)
    gaps = [float((a[n].double() - b[n].double()).abs().max()) for n in a if a[n].numel()]
    return max(gaps)


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return set(a) == set(b) and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)
