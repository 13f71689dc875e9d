"""Routes: which rule takes a parameter, and the reason to show for it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from math import prod
from typing import Any

from torch import Tensor

from ..transform import Param, Transform
from .groups import Group
from .roles import ROLES

# Roles whose weight decay `decay_vectors` decides: shrinking a gain or a shift to zero is no regularization of the function.
VECTORS = ("norm", "bias", "vector", "scalar")

_FLAT = re.compile(r"_?flat_param(_\d+)?")
_FLATTENED = (
    "FSDP1 flattens parameters into one dimension, and use_orig_params=True gives the matrices back only where nothing is "
    "sharded (NO_SHARD); shard with FSDP2, torch.distributed.fsdp.fully_shard, which keeps every matrix"
)


@dataclass(frozen=True, eq=False)
class Route:
    """One rule and the parameters it takes.

    Args:
        name: stands in the parameter group under "rule", and in `plan()`.
        rule: the update rule.
        when: the reason, shown to the user, if this route takes the parameter, else None.
        options: hyper-parameters of this route, which a group's own beat.
        optional: whether a model may have nothing for it.
    """

    name: str
    rule: Transform
    when: Callable[[Param], str | None]
    options: Mapping[str, Any] = field(default_factory=dict)
    optional: bool = False


@dataclass
class Assigned:
    """The parameters of one group that one route took: what becomes a `param_groups` entry of the optimizer."""

    route: Route
    tensors: list[Tensor]
    described: list[Param]
    reasons: list[str]
    options: dict[str, Any]


def assign(group: Group, routes: Sequence[Route], *, decay_vectors: bool = True) -> list[Assigned]:
    """Give each parameter of `group` to the first route that takes it.

    One result for each route used, in the order of `routes`, parameters in the order given; `Param.index` and `count` then
    count within it. A value that the group sets for itself beats the route's, and a group that sets "rule" to a route's name
    is asked of that route alone.

    Args:
        group: one of `collect`'s.
        routes: in order of precedence; usually the last one takes `everything`.
        decay_vectors: whether norms, biases, vectors and scalars are decayed like the rest, as torch.optim does. If not, they
            come as a further result of the same route with `weight_decay` 0, except in a group of nothing else that sets
            its own `weight_decay`: there the caller has sorted by hand.

    Raises:
        ValueError: no route takes a parameter; two routes have one name; "rule" names no route; or the parameters were
            flattened by FSDP1 and a matrix rule is asked of them.
    """
    names = [route.name for route in routes]
    if len(set(names)) < len(names):
        raise ValueError(f"routes: every name may stand once, got {names}")
    wanted = group.options.get("rule")
    if wanted is not None and wanted not in names:
        raise ValueError(f"params: a group asks for rule {wanted!r}; this optimizer has {', '.join(names)}")
    asked = [route for route in routes if wanted in (None, route.name)]
    sorted_by_hand = "weight_decay" in group.options and all(p.role in VECTORS for p in group.described)
    split = not decay_vectors and not sorted_by_hand

    taken: dict[tuple[int, bool], Assigned] = {}
    for tensor, param in zip(group.tensors, group.described, strict=True):
        place, reason = _first(asked, param)
        spared = split and param.role in VECTORS
        if (place, spared) not in taken:
            options = {**asked[place].options, **group.options, **({"weight_decay": 0.0} if spared else {})}
            taken[place, spared] = Assigned(asked[place], [], [], [], options)
        into = taken[place, spared]
        into.tensors.append(tensor)
        into.described.append(param)
        into.reasons.append(reason)
    for into in taken.values():
        count = len(into.described)
        into.described = [replace(param, index=i, count=count) for i, param in enumerate(into.described)]
    return [taken[key] for key in sorted(taken)]


def _first(routes: Sequence[Route], param: Param) -> tuple[int, str]:
    for place, route in enumerate(routes):
        reason = route.when(param)
        if reason is not None:
            return place, reason
    raise ValueError(
        f"no route takes {param.name!r} (role {param.role}, shape {tuple(param.shape)}); asked: "
        f"{', '.join(route.name for route in routes)}. End the routes with one that takes everything, or leave it out of params"
    )


def check_used(routes: Iterable[Route], assigned: Iterable[Assigned]) -> None:
    """Raise ValueError if a route took nothing in the whole optimizer: its rule was asked for and would do nothing.

    A route of `everything` is exempt, being there for what the others leave, which may be nothing; so is an `optional` one.

    Args:
        routes: those given to `assign`.
        assigned: the results of all groups.
    """
    assigned = list(assigned)
    used = {id(one.route) for one in assigned}
    described = [param for one in assigned for param in one.described]
    for route in routes:
        if id(route) in used or route.when is everything or route.optional:
            continue
        roles = ", ".join(f"{count} {role}" for role, count in Counter(param.role for param in described).most_common())
        hint = f". {_FLATTENED}" if described and all(len(param.shape) < 2 for param in described) else ""
        raise ValueError(
            f"rule {route.name!r} would touch nothing: it takes none of {len(described)} parameters ({roles}){hint}"
        )


def everything(p: Param) -> str:
    """Takes every parameter; the reason is what it is."""
    return f"tied {p.role}" if p.tied else p.role


def hidden_matrices(p: Param) -> str | None:
    """Takes weights that map features to features: matrices, convolutions as (out, in * kernel), stacks of experts.

    A matrix with a single row or column is a vector by another name and is left alone, as are embeddings and output heads,
    whose rows belong to tokens and classes one by one.

    Raises:
        ValueError: the parameter is FSDP1's flat one, which has no rows and columns left.
    """
    if _FLAT.fullmatch(p.name.rpartition(".")[2]):
        raise ValueError(f"params: {p.name!r} is not a matrix any more: {_FLATTENED}")
    if p.role not in ("matrix", "conv", "experts") or len(p.shape) < 2:
        return None
    rows, columns = p.matrix
    if min(rows, columns) < 2:
        return None
    if p.role == "experts":
        return f"{prod(p.shape[:-2])} experts of {rows} x {columns}"
    return f"{'convolution as' if p.role == 'conv' else 'hidden matrix'} {rows} x {columns}"


def by_role(*roles: str) -> Callable[[Param], str | None]:
    """Takes parameters of any of these roles: matrix, conv, experts, embedding, head, norm, bias, vector, scalar."""
    unknown = [role for role in roles if role not in ROLES]
    if unknown or not roles:
        raise ValueError(f"by_role({', '.join(map(repr, roles))}): roles are {', '.join(ROLES)}")
    return partial(_has_role, roles)


def _has_role(roles: tuple[str, ...], p: Param) -> str | None:
    return everything(p) if p.role in roles else None


def by_name(pattern: str | re.Pattern[str]) -> Callable[[Param], str | None]:
    """Takes parameters by name.

    Args:
        pattern: a glob that must match the whole name (`"blocks.*.attn.*"`), or a regular expression that may match anywhere in
            it, compiled or as text after "re:" (`r"re:blocks\\.[0-3]\\."`). Names are `Param.name`s, without wrappers.
    """
    if isinstance(pattern, str) and not pattern.startswith("re:"):
        return partial(_fits, pattern)
    return partial(_contains, re.compile(pattern[3:]) if isinstance(pattern, str) else pattern)


def _fits(pattern: str, p: Param) -> str | None:
    return f"name matches {pattern}" if fnmatchcase(p.name, pattern) else None


def _contains(expression: re.Pattern[str], p: Param) -> str | None:
    return f"name matches {expression.pattern}" if expression.search(p.name) else None
