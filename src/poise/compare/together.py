"""The signature of what is built of several methods, whose settings are given together."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping


def together(
    title: str,
    inside: Mapping[str, inspect.Parameter],
    around: Mapping[str, inspect.Parameter],
    *,
    reserved: Collection[str] = (),
) -> inspect.Signature:
    """All parameters of both, keyword-only; `reserved` are names that the whole takes itself.

    Raises:
        ValueError: if a name is in both, or `around` has a reserved one.
    """
    both = sorted(set(around) & (set(inside) | set(reserved)))
    if both:
        raise ValueError(f"{title}: both have a setting {both[0]!r}, so it would not be known whose is meant")
    named = [p.replace(kind=p.KEYWORD_ONLY) for p in (*inside.values(), *around.values()) if p.kind is not p.VAR_KEYWORD]
    return inspect.Signature(named)
