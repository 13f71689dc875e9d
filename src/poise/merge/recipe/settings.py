"""What a setting is for one tensor: cases by name, gradients over layers, the nearest level first."""

from __future__ import annotations

from collections.abc import Sequence

from .schema import Case, Setting, Settings, Value


def value_at(setting: Setting, name: str | None, depth: float) -> Value | None:
    """The value of a setting for a tensor.

    A gradient (v_0, ..., v_n) is interpolated linearly at `depth` in [0, 1]: between v_i and v_{i+1}, with i = floor(depth n);
    text is not interpolated, there v_i holds. Of cases, the first whose filter is part of the name holds; a case without a
    filter, or with "*", fits every name, and None is returned if none fits. (mergekit's rules.)

    Args:
        name: of the tensor; None: only what holds for every name.
        depth: of its layer, 0 the first and 1 the last. Tensors outside of layers have depth 0.
    """
    if not isinstance(setting, tuple):
        return setting
    if setting and isinstance(setting[0], Case):
        for case in setting:
            assert isinstance(case, Case)
            if case.filter in (None, "*") or (name is not None and str(case.filter) in name):
                return value_at(case.value, name, depth)
        return None
    values = [value for value in setting if not isinstance(value, Case)]
    place = depth * (len(values) - 1)
    low = int(place)
    if any(isinstance(value, str) for value in values):
        return values[low]
    first, second = values[low], values[min(low + 1, len(values) - 1)]
    assert not isinstance(first, str) and not isinstance(second, str)
    return (1 - (place - low)) * first + (place - low) * second


def look_up(key: str, levels: Sequence[Settings], name: str | None, depth: float) -> Value | None:
    """The value at the first of `levels` that has one: source, then slice, then recipe."""
    for level in levels:
        if key in level:
            found = value_at(level[key], name, depth)
            if found is not None:
                return found
    return None


def depth_of(place: int, count: int) -> float:
    """Depth of layer `place` of a slice of `count`: from 0 to 1; a single layer is the last."""
    return place / (count - 1) if count > 1 else 1.0
