"""Which parameter gets which rule, and what a rule may know of it.

Three steps, each its own file:

    groups = collect(model)                                     # what the caller gave, each tensor described by a `Param`
    assigned = [a for g in groups for a in assign(g, routes)]   # each to the first route that takes it, with the reason
    check_used(routes, assigned)                                # a rule that would touch nothing is an error

`sources` reads `params` in all its forms, `tree` walks a model and undoes wrappers, `roles` says what a parameter is, `groups`
puts the three together, `routes` hands parameters to rules.
"""

from __future__ import annotations

from .groups import Group, collect
from .routes import (
    Assigned,
    Route,
    assign,
    by_name,
    by_role,
    check_used,
    everything,
    hidden_matrices,
)
from .sources import Params

__all__ = [
    "Assigned",
    "Group",
    "Params",
    "Route",
    "assign",
    "by_name",
    "by_role",
    "check_used",
    "collect",
    "everything",
    "hidden_matrices",
]
