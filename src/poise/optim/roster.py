"""Which parameters an optimizer has: by which rule each of them moves and why, and all that is known of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from poise.memory import codec as codecs

from .engine.engine import chain_of
from .engine.layers import Layer, join
from .engine.members import Member
from .options import Options, check_rate, complete, rms_scale
from .routing import Assigned, Group, Params, Route, assign, check_used, collect, everything
from .transform import Chain, Param, Transform
from .transforms.step import Decay


@dataclass(frozen=True)
class Roster:
    """Routes, and what they made of the parameters that were given so far.

    Args:
        rules: the whole chain of each route, by its name.
        base: learning rate and decay of groups that set none.
        taken: the caller's groups, as they were given.
        described, reasons: for each `param_groups` entry, what is known of its parameters and why its route took them.
    """

    routes: Sequence[Route]
    rules: Mapping[str, Chain]
    base: Mapping[str, Any]
    options: Options
    taken: tuple[Group, ...] = ()
    described: tuple[list[Param], ...] = ()
    reasons: tuple[list[str], ...] = ()

    @classmethod
    def of(cls, rule: Transform | Sequence[Route], base: Mapping[str, Any], decay: Decay, options: Options) -> Roster:
        """The roster of `rule`, with no parameters yet."""
        for setting, value in base.items():
            check_rate(setting, value)
        routes = [Route(_name(rule), rule, everything)] if isinstance(rule, Transform) else list(rule)
        if not routes:
            raise ValueError("rule: at least one route is needed")
        return cls(routes, {route.name: complete(chain_of(route.rule), decay) for route in routes}, base, options)

    @property
    def defaults(self) -> dict[str, Any]:
        """Every hyper-parameter of any rule; torch's schedulers look for "momentum" and "betas" here, then in every group."""
        return {**self.base, **{name: value for rule in self.rules.values() for name, value in rule.defaults.items()}}

    def joined(self, params: Params) -> tuple[Roster, list[dict[str, Any]]]:
        """The roster with `params` too, and the `param_groups` entries that they make."""
        groups = collect(params, known=self.taken)
        sorts = self.options.get("decay_vectors", True)
        assigned = [one for group in groups for one in assign(group, self.routes, decay_vectors=sorts)]
        if not self.taken:
            check_used(self.routes, assigned)
        entries = [self._entry(one) for one in assigned]
        described = (*self.described, *(one.described for one in assigned))
        reasons = (*self.reasons, *(one.reasons for one in assigned))
        return replace(self, taken=(*self.taken, *groups), described=described, reasons=reasons), entries

    def _entry(self, one: Assigned) -> dict[str, Any]:
        """A torch parameter group for what one route took of one of the caller's groups."""
        defaults = {**self.base, **self.rules[one.route.name].defaults}
        known = {*self.defaults, "rule", "initial_lr"}
        strange = set(one.options) - known - {"max_lr", "min_lr", "name"}
        if strange:
            raise ValueError(f"params: unknown group option {min(strange)!r}; known: {', '.join(sorted(known))}")
        options = {name: value for name, value in one.options.items() if name in defaults or name not in known}
        options |= {name: one.options[name] for name in ("initial_lr",) if name in one.options}
        check_rate("lr", options.get("lr", 0.0))
        check_rate("weight_decay", options.get("weight_decay", 0.0))
        names = [p.name for p in one.described]
        return {"params": one.tensors, "param_names": names, **defaults, **options, "rule": one.route.name, "clock": 0}

    def placed(self, groups: Sequence[dict[str, Any]]) -> Iterator[tuple[Tensor, Param, dict[str, Any]]]:
        """Every parameter with its group, and its place among those of its rule."""
        counts: Counter[str] = Counter()
        for group in groups:
            counts[group["rule"]] += len(group["params"])
        seen: Counter[str] = Counter()
        for group, described in zip(groups, self.described, strict=True):
            for tensor, p in zip(group["params"], described, strict=True):
                yield tensor, replace(p, index=seen[group["rule"]], count=counts[group["rule"]]), group
                seen[group["rule"]] += 1

    def members(self, groups: Sequence[dict[str, Any]], kept: frozenset[str] | None) -> list[Member]:
        """Every parameter of `groups`, or those whose names are in `kept`, as the engine sees them, without state."""
        members: list[Member] = []
        layers = self.layers(groups)
        weights, seed = self.options.get("weights", "auto"), self.options.get("seed", 0)
        for tensor, p, group in self.placed(groups):
            if kept is not None and p.name not in kept:
                continue
            name = group["rule"]
            layer = layers[name][p.name] if name in layers else None
            member = Member(tensor, p, group, self.rules[name], self.codec(p), weights, seed, layer)
            if self.options.get("scale") is not None:
                member.scale = rms_scale(self.rules[name], p, name)
            members.append(member)
        by_name = {m.spec.name: m for m in members}
        for m in members:
            m.partner = by_name[m.layer.partner] if m.layer is not None and m.layer.partner is not None else None
        return members

    def layers(self, groups: Sequence[dict[str, Any]]) -> dict[str, dict[str, Layer]]:
        """For each rule with links of unit "layer", what every parameter is to its layer."""
        found: dict[str, dict[str, Layer]] = {}
        for name, rule in self.rules.items():
            if any(link.unit == "layer" for link in rule):
                pairs = zip(groups, self.described, strict=True)
                found[name] = join([p for group, described in pairs if group["rule"] == name for p in described])
        return found

    def chosen(self, groups: Sequence[dict[str, Any]], params: Iterable[Tensor] | None) -> frozenset[str] | None:
        """Names of the parameters that `Optimizer.keep_only(params)` keeps; None: all."""
        known = {id(tensor): p.name for tensor, p, _ in self.placed(groups)}
        wanted = {id(p) for p in params} if params is not None else set(known)
        if not wanted or not wanted <= set(known):
            raise ValueError("keep_only(params): must be some of the optimizer's own parameters")
        names = frozenset(known[key] for key in wanted)
        for layers in self.layers(groups).values():
            for name, layer in layers.items():
                if name in names and layer.partner is not None and layer.partner not in names:
                    raise ValueError(f"keep_only(params): has {name!r} without {layer.partner!r}, which its rule sees as one")
        return None if len(names) == len(known) else names

    def why(self) -> dict[str, str]:
        """Why its rule took each parameter, by name."""
        pairs = zip(self.described, self.reasons, strict=True)
        return {p.name: reason for ps, reasons in pairs for p, reason in zip(ps, reasons, strict=True)}

    def codec(self, p: Param) -> codecs.Codec | None:
        """The format that the caller wants state of this parameter kept in."""
        wanted = self.options.get("state", "fp32")
        if isinstance(wanted, Mapping):
            wanted = wanted.get(p.role, wanted.get("*", "fp32"))
        return codecs.get(wanted)


def _name(rule: Transform) -> str:
    links = chain_of(rule).links
    return "+".join(type(link).__name__ for link in links)
