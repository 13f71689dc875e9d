"""How orthogonal the updates of an optimizer at work are: Muon's, and of every rule with an `orthogonalize` link."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from poise.linalg.orthogonality import OrthogonalizationError, orthogonalization_error

from .engine.engine import Engine
from .engine.measuring import seen
from .engine.members import Member
from .optimizer import Optimizer
from .transform import Chain, Context, State, Transform
from .transforms.spectral import matrices, orthogonalize

Errors = dict[str, OrthogonalizationError]
NONE = "{}: none of its rules has an orthogonalize link, as Muon's has"


@torch.no_grad()
def orthogonality(opt: Optimizer) -> Errors:
    """The errors of the matrices that the gradients which stand in the parameters would be orthogonalized to.

    Changes nothing. The links before `orthogonalize` are run on a copy of the state, so what is judged is the momentum that the
    next step would orthogonalize, in the precision and with the steps that it would take.

    Returns:
        By parameter name, with one value for each matrix of it: the parts of a fused projection, or stacked experts.

    Raises:
        ValueError: if no rule of `opt` orthogonalizes.
    """
    members = opt._current().members
    rules = {id(m.rule): m.rule for m in members}
    until = {key: links for key, rule in rules.items() if (links := _until(rule))}
    if not until:
        raise ValueError(NONE.format(type(opt).__name__))
    concerned = [m for m in members if id(m.rule) in until and m.tensor.grad is not None]
    before = _updates(opt, concerned, {key: links[:-1] for key, links in until.items()})
    after = _updates(opt, concerned, until)
    found: Errors = {}
    for m, M, O in zip(concerned, before, after, strict=True):
        rows = [part for part, _ in matrices(m.spec)]
        pieces = zip(M.split(rows, dim=-2), O.split(rows, dim=-2), strict=True)
        found[m.spec.name] = _joined([orthogonalization_error(*piece) for piece in pieces])
    return found


def log_orthogonality(opt: Optimizer, every: int, log: Callable[[int, Errors], Any]) -> RemovableHandle:
    """After every so many steps, call `log(steps taken, orthogonality(opt))`; the gradients are those of the step just taken.

        handle = log_orthogonality(opt, 100, lambda step, errors: print(step, max(e.spectral.max() for e in errors.values())))

    Returns:
        The hook, to `remove()`. The count begins with it, and is not saved.

    Raises:
        ValueError: if `every` is below 1, or no rule of `opt` orthogonalizes.
    """
    if every < 1:
        raise ValueError(f"every={every}: must be at least 1")
    if not any(_until(m.rule) for m in opt._current().members):
        raise ValueError(NONE.format(type(opt).__name__))
    taken = 0

    def look(*_: Any) -> None:
        nonlocal taken
        taken += 1
        if taken % every == 0:
            log(taken, orthogonality(opt))

    return opt.register_step_post_hook(look)


class _same(Transform):
    """What it is given: the engine wants an elementwise link at the end of a chain."""

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return u


def _until(rule: Chain) -> tuple[Transform, ...]:
    """The links up to and with `orthogonalize`; none where there is none."""
    links = tuple(rule)
    return next((links[: i + 1] for i, link in enumerate(links) if isinstance(link, orthogonalize)), ())


def _updates(opt: Optimizer, members: list[Member], links: Mapping[int, tuple[Transform, ...]]) -> list[Tensor]:
    """What comes out of `links`, the beginning of each rule, as the matrices that `orthogonalize` sees."""
    chains = {key: Chain((*some, _same())) for key, some in links.items()}
    weights, seed = opt._roster.options.get("weights", "auto"), opt._roster.options.get("seed", 0)
    groups = {id(m.group): dict(m.group) for m in members}
    twins = []
    for m in members:
        twin = Member(m.tensor, m.spec, groups[id(m.group)], chains[id(m.rule)], opt._roster.codec(m.spec), weights, seed)
        names = {"step", *twin.kept()}
        twin.state = {key: value.clone() for key, value in m.state.items() if key in names}
        twins.append(twin)
    captured: dict[Member, Tensor] = {}
    Engine(twins, "eager").step(opt._feeds, None, captured)
    return [seen("matrix", twin, captured) for twin in twins]


def _joined(errors: list[OrthogonalizationError]) -> OrthogonalizationError:
    """One value after another."""
    return OrthogonalizationError(
        **{field.name: torch.cat([getattr(error, field.name).reshape(-1) for error in errors]) for field in fields(errors[0])}
    )
