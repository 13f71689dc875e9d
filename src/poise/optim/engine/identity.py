"""What says all about a rule, so that a kernel of one like it is found without tracing it again.

A rule is its classes, their functions and what its objects hold. That is all only where the functions are poise's own, which
nobody rewrites while a process runs; a user's, which may call what the next cell of a notebook changes, is traced each time.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from types import FunctionType, MappingProxyType
from typing import Any

import torch

from .links import Bound
from .program import Program

PLAIN = (type(None), bool, int, str, bytes, torch.dtype)


class Unknown(Exception):
    """Something that cannot be compared by value, or whose code is not poise's own."""


def identity(program: Program, *more: Any) -> Hashable | None:
    """Equal for two programs, and what is told beside them, only if they compute the same; None if that cannot be said."""
    facts = (program.begins, program.ends, program.names, program.measures, program.feeds)
    try:
        links = [tuple(map(_bound, bounds)) for bounds in (program.bound, program.listeners)]
        return *links, _value(facts), _value(more)
    except Unknown:
        return None


def _bound(bound: Bound) -> Hashable:
    """Without the parameter: compiled rules do not see it."""
    named = (bound.prefix, bound.slots, bound.shared, bound.salt, bound.blocks is not None, sorted(bound.narrow))
    return _value(bound.link), _value(named), _value(bound.outer), tuple(map(_bound, bound.inner))


def _value(value: Any) -> Hashable:
    """Equal only for values that are the same in every respect: 1, 1.0 and True are not, nor 0.0 and -0.0."""
    kind = type(value)
    if isinstance(value, PLAIN):
        return kind, value
    if kind is float:
        return kind, value.hex()
    if kind in (tuple, list):
        return kind, *map(_value, value)
    if kind in (dict, MappingProxyType):
        assert isinstance(value, Mapping)
        return dict, *((_value(key), _value(of)) for key, of in value.items())
    if kind is FunctionType:
        return _own(value)
    if kind is type:
        return _class(value)
    return _class(kind), _value(getattr(value, "__dict__", {}))


def _class(kind: type) -> Hashable:
    """A class, and every function that it or a base defines, whoever put it there."""
    functions = []
    for base in _own(kind).__mro__[:-1]:
        if _own(base).__dict__.get("__slots__"):
            raise Unknown
        for value in vars(base).values():
            value = getattr(value, "fget", getattr(value, "__func__", value))  # of properties, class and static methods
            if isinstance(value, FunctionType):
                functions.append(_own(value))
    return kind, tuple(functions)


def _own(what: Any) -> Any:
    """A class or a function, if it is poise's own."""
    if str(what.__module__).partition(".")[0] != "poise":
        raise Unknown
    return what
