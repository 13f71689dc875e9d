"""Two methods as one: what stands around another is built with it, and each setting goes to whichever of the two knows it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from poise.catalog import Method


class Together:
    """`outer` around `inner`, callable as a method of its own by a subclass.

    Args:
        word: the setting that names the inner method.
        own: settings of the outer one; all others are the inner one's.

    Raises:
        ValueError: if both have a setting of one name.
    """

    def __init__(self, outer: Method, word: str, inner: Method, own: Mapping[str, inspect.Parameter]) -> None:
        self.outer, self.word, self.inner, self.own = outer, word, inner, list(own)
        self.__wrapped__ = outer.target  # whose source finished runs are of
        self.__name__, self.__qualname__ = outer.name, f"{outer.name}({word}={inner.name})"
        inside = inspect.signature(inner.target).parameters
        both = sorted(set(own) & {*inside, word})
        if both:
            raise ValueError(f"{self.__qualname__}: both have a setting {both[0]!r}, so it would not be known whose is meant")
        every = [p.replace(kind=p.KEYWORD_ONLY) for p in (*inside.values(), *own.values()) if p.kind is not p.VAR_KEYWORD]
        self.__signature__ = inspect.Signature(every)

    def parted(self, hyper: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Settings of the outer and of the inner method."""
        own = {name: value for name, value in hyper.items() if name in self.own}
        return own, {name: value for name, value in hyper.items() if name not in own and name != self.word}
