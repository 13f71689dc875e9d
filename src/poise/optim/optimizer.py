"""The `torch.optim.Optimizer` around a rule: groups, state, step, state_dict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Unpack

import torch
from torch import Tensor

from poise.memory import codec as codecs

from . import resume
from .engine import storage
from .engine.calls import initial
from .engine.engine import Engine, chain_of
from .engine.layers import Layer, join
from .engine.members import LOW, Member
from .given import by_tensor
from .options import Options, check_options, check_rate, complete, rms_scale
from .plan import Plan
from .routing import Assigned, Params, Route, assign, check_used, collect, everything
from .transform import Chain, Param, Transform
from .transforms.step import Decay


class Optimizer(torch.optim.Optimizer):
    """Any rule as a torch optimizer: closures, schedulers, hooks, GradScaler and `state_dict` work as usual.

    The displacement of a parameter is `chain(rule, scale_by_lr(), decay(mode))` of its gradient, unless the rule owns its step.

    Args:
        params: a module, named parameters, tensors, or group dicts. From a module the role of every parameter is known.
        rule: one Transform for all parameters, or `Route`s that say which parameter gets which rule.
        lr: learning rate, a number or a tensor, per group.
        weight_decay: decoupled decay, per group; where it acts is said by `decay`.
        decay: "coupled" (`lr * weight_decay`, as PyTorch's AdamW), "independent" (`weight_decay` follows the schedule only),
            "after" (the moved weights decay), or "l2" (added to the gradient, as PyTorch's SGD).
        state: how state is kept: "fp32", "bf16", "int8", "int4", a codec, or one for each role, as in
            `{"embedding": "fp32", "*": "int8"}`.
            Slots under 4096 elements stay in full precision.
        weights: how bfloat16 weights are written: "auto" and "stochastic" round stochastically (on average the weight moves by
            the update, however small), "split" keeps the lower 16 bits as 2 more bytes of state (exact), "nearest" rounds to
            nearest, which loses updates below 1/512 of the weight. "int8", "int4", "fp8" or a `poise.memory.grid.Grid` keep
            matrices of any dtype on the grid of that format; `ECO` is made for these.
        scale: None keeps each rule's own scale; "rms" gives all the update size of AdamW (0.2 lr), so that a learning rate
            carries over between rules.
        decay_vectors: whether norms, biases and other vectors decay too, as in torch.optim.
        seed: of every random number the optimizer draws. They depend on seed, parameter name, step and element only.
        backend: how rules are run: "auto" takes native tiles on a CPU with a compiler, pieces without one, and torch.compile
            elsewhere.

    Raises:
        TypeError, ValueError: for parameters or settings that cannot work, before anything is changed.
    """

    def __init__(
        self,
        params: Params,
        rule: Transform | Sequence[Route],
        lr: float | Tensor,
        weight_decay: float = 0.0,
        decay: Decay = "coupled",
        **options: Unpack[Options],
    ) -> None:
        unknown = set(options) - set(Options.__annotations__)
        if unknown:
            raise TypeError(
                f"{type(self).__name__}: unknown option {min(unknown)!r}; known: {', '.join(Options.__annotations__)}"
            )
        check_options(options)
        check_rate("lr", lr)
        check_rate("weight_decay", weight_decay)
        self._options: Options = options
        self._engine: Engine | None = None
        self._feeds: dict[str, dict[int, Tensor]] = {}
        self._kept: frozenset[str] | None = None  # names of the parameters that have state and are stepped; None: all
        routes = [Route(_name(rule), rule, everything)] if isinstance(rule, Transform) else list(rule)
        if not routes:
            raise ValueError("rule: at least one route is needed")
        self._routes = routes
        self._rules = {route.name: complete(chain_of(route.rule), decay) for route in routes}
        self._base = {"lr": lr, "weight_decay": weight_decay}
        self._groups = collect(params)
        assigned = [
            one for group in self._groups for one in assign(group, routes, decay_vectors=options.get("decay_vectors", True))
        ]
        check_used(routes, assigned)
        self._described: list[list[Param]] = []
        self._reasons: list[list[str]] = []
        self._ready = False
        # torch's schedulers look for "momentum" and "betas" in here, and then in every group
        defaults = {**self._base, **{name: value for rule in self._rules.values() for name, value in rule.defaults.items()}}
        super().__init__([self._group(one) for one in assigned], defaults)
        self._ready = True
        self._create()

    # -- groups and state ---------------------------------------------------------------------------------------------

    def _group(self, one: Assigned) -> dict[str, Any]:
        """A torch parameter group for what one route took of one of the caller's groups."""
        defaults = {**self._base, **self._rules[one.route.name].defaults}
        known = {*self._base, *(name for rule in self._rules.values() for name in rule.defaults), "rule", "initial_lr"}
        strange = set(one.options) - known - {"max_lr", "min_lr", "name"}
        if strange:
            raise ValueError(f"params: unknown group option {min(strange)!r}; known: {', '.join(sorted(known))}")
        options = {name: value for name, value in one.options.items() if name in defaults or name not in known}
        options |= {name: one.options[name] for name in ("initial_lr",) if name in one.options}
        check_rate("lr", options.get("lr", 0.0))
        check_rate("weight_decay", options.get("weight_decay", 0.0))
        self._described.append(one.described)
        self._reasons.append(one.reasons)
        names = [p.name for p in one.described]
        return {"params": one.tensors, "param_names": names, **defaults, **options, "rule": one.route.name, "clock": 0}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, as torch.optim does; they are routed like the others."""
        if not self._ready:
            super().add_param_group(param_group)
            return
        groups = collect([param_group], known=self._groups)
        routed = [
            one
            for group in groups
            for one in assign(group, self._routes, decay_vectors=self._options.get("decay_vectors", True))
        ]
        before = len(self.param_groups)
        try:
            for one in routed:
                super().add_param_group(self._group(one))
            self._create()
        except Exception:
            for group in self.param_groups[before:]:
                for tensor in group["params"]:
                    self.state.pop(tensor, None)
            del self.param_groups[before:], self._described[before:], self._reasons[before:]
            raise
        self._groups += groups

    def _members(self) -> list[Member]:
        """Every parameter that is kept, with its rule and state, in the order of the groups."""
        members = []
        counts: Counter[str] = Counter()
        for group in self.param_groups:
            counts[group["rule"]] += len(group["params"])
        placed: Counter[str] = Counter()
        weights, seed = self._options.get("weights", "auto"), self._options.get("seed", 0)
        layers = self._layers()
        for group, described in zip(self.param_groups, self._described, strict=True):
            rule = self._rules[group["rule"]]
            for tensor, spec in zip(group["params"], described, strict=True):
                spec = replace(spec, index=placed[group["rule"]], count=counts[group["rule"]])
                placed[group["rule"]] += 1
                if self._kept is not None and spec.name not in self._kept:
                    continue
                layer = layers[group["rule"]][spec.name] if group["rule"] in layers else None
                member = Member(tensor, spec, group, rule, self._codec(spec), weights, seed, layer)
                if self._options.get("scale") is not None:
                    member.scale = rms_scale(rule, spec, group["rule"])
                members.append(member)
        by_name = {m.spec.name: m for m in members}
        for m in members:
            m.partner = by_name[m.layer.partner] if m.layer is not None and m.layer.partner is not None else None
        return members

    def _layers(self) -> dict[str, dict[str, Layer]]:
        """For each rule with links of unit "layer", what every parameter is to its layer."""
        found: dict[str, dict[str, Layer]] = {}
        for name, rule in self._rules.items():
            if any(link.unit == "layer" for link in rule):
                groups = zip(self.param_groups, self._described, strict=True)
                found[name] = join([p for group, described in groups if group["rule"] == name for p in described])
        return found

    def _codec(self, p: Param) -> codecs.Codec | None:
        wanted = self._options.get("state", "fp32")
        if isinstance(wanted, Mapping):
            wanted = wanted.get(p.role, wanted.get("*", "fp32"))
        return codecs.get(wanted)

    def _create(self) -> None:
        """Give state to every parameter that has none, and make the engine."""
        members = self._members()
        held: set[int] = set()
        for m in members:
            if m.tensor not in self.state:
                self.state[m.tensor] = m.state = m.create()
            else:
                m.state = self.state[m.tensor]
                resume.fit(m)
            for bound in m.bound:
                if id(bound.link) not in held:
                    held.add(id(bound.link))
                    for key in bound.shared.values():
                        slot = m.shared[key]
                        like = torch.empty(0, dtype=slot.dtype, device=m.device)
                        m.state.setdefault(key, initial(slot, slot.shape, like, None))
        self._engine = Engine(members, self._options.get("backend", "auto"))

    @torch.no_grad()
    def keep_only(self, params: Iterable[Tensor] | None) -> None:
        """Keep state for these parameters alone, and leave the others as they are, until it is called anew. None: for all.

        State that is dropped is gone: a parameter that comes back begins anew. That of parameters which stay is untouched, and
        the lower halves of split weights, which are weights, stay too. What a link shares over all parameters goes with the
        first that holds it. Snapshots know what was kept; a state_dict loads where the same parameters are.

        Raises:
            ValueError: for no parameters, one of another optimizer, or half of a layer that its rule sees as one.
        """
        members = {id(t): p for group, ps in zip(self.param_groups, self._described, strict=True)
                   for t, p in zip(group["params"], ps, strict=True)}  # fmt: skip
        wanted = {id(p) for p in params} if params is not None else set(members)
        if not wanted or not wanted <= set(members):
            raise ValueError("keep_only(params): must be some of the optimizer's own parameters")
        names = frozenset(members[key].name for key in wanted)
        for layers in self._layers().values():
            for name, layer in layers.items():
                if name in names and layer.partner is not None and layer.partner not in names:
                    raise ValueError(f"keep_only(params): has {name!r} without {layer.partner!r}, which its rule sees as one")
        self._keep(None if len(names) == len(members) else names)

    def _keep(self, names: frozenset[str] | None) -> None:
        """Drop the state of all other parameters, and make that which is lacking."""
        if names == self._kept:
            return
        self._kept = names
        for group in self.param_groups:
            for tensor, name in zip(group["params"], group["param_names"], strict=True):
                if names is not None and name not in names and tensor in self.state:
                    low = self.state[tensor].get(LOW)
                    if low is None:
                        del self.state[tensor]
                    else:
                        self.state[tensor] = {LOW: low}
        self._create()

    def _current(self) -> Engine:
        """The engine, made anew if parameters have changed their dtype or device since."""
        if self._engine is None or self._engine.stale():
            self._create()
        assert self._engine is not None
        return self._engine

    # -- stepping -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with the gradients that stand in the parameters; parameters without one are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        feeds, self._feeds = self._feeds, {}
        known = torch.tensor(loss, dtype=torch.float64) if isinstance(loss, float) else loss
        engine = self._current()
        kind = engine.members[0].device.type
        lowered = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
        with lowered:  # the precision of an update is the rule's business
            engine.step(feeds, known if isinstance(known, Tensor) else None)
        return loss

    def feed(self, **tensors: Mapping[Any, Tensor] | Sequence[Tensor]) -> None:
        """Give the next step tensors that a rule reads beside the gradient (`Transform.feeds` and `Transform.may_feed`).

        One step uses them up. Each is a mapping from parameter, or parameter name, to a tensor of its shape, or a list in the
        order of the groups.
        """
        members = self._current().members
        wanted = {name for m in members for link in m.rule for name in (*link.feeds, *link.may_feed)}
        for name, given in tensors.items():
            if name not in wanted:
                raise ValueError(
                    f"feed({name}=...): no rule here reads {name!r}; wanted: {', '.join(sorted(wanted)) or 'nothing'}"
                )
            self._feeds[name] = by_tensor(members, given, f"feed({name}=...)")

    @torch.no_grad()
    def preview(self, grads: Mapping[Any, Tensor] | Sequence[Tensor] | None = None) -> dict[str, Tensor]:
        """The displacement that each parameter would get from `grads` (default: the gradients that stand in them).

        Changes nothing. Returns name -> tensor in the computing dtype (this rank's piece of sharded parameters), without the
        parameters that have no gradient. A rule that needs the loss is given 1.
        """
        engine = self._current()
        given = None if grads is None else by_tensor(engine.members, grads, "preview(grads)")
        before = self.snapshot(params=False)
        held = [m.tensor.grad for m in engine.members]
        captured: dict[Member, Tensor] = {}
        try:
            if given is not None:
                for m in engine.members:
                    grad = given.get(id(m.tensor))
                    m.tensor.grad = None if grad is None else grad.to(m.tensor.dtype)
            engine.step(self._feeds, None, captured)
        finally:
            for m, grad in zip(engine.members, held, strict=True):
                m.tensor.grad = grad
            self.restore(before)
        return {m.spec.name: u for m, u in captured.items()}

    @torch.no_grad()
    def snapshot(self, state: bool = True, params: bool = True) -> dict[str, Any]:
        """A copy of weights and, with `state`, of everything the optimizer keeps, for `restore`."""
        self._current()
        return resume.take(self.param_groups, self.state, state, params) | ({"kept": self._kept} if state else {})

    @torch.no_grad()
    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Put back what `snapshot` copied, bit for bit."""
        if "kept" in snapshot:
            self._keep(snapshot["kept"])
        self._current()
        resume.put_back(self.param_groups, self.state, snapshot)

    @torch.no_grad()
    def begin_anew(self) -> None:
        """Forget everything that steps left in the state, as if none had been taken; weights and settings stay.

        The lower halves of split weights are weights. A slot that begins as the weights begins as they are now.
        """
        resume.begin(self._current().members, self.param_groups)

    def rule_of(self, group: Mapping[str, Any]) -> Chain:
        """The whole chain by which the parameters of `group` move, with learning rate and decay."""
        return self._rules[group["rule"]]

    def plan(self, grads: Mapping[Any, Tensor] | Sequence[Tensor] | None = None) -> Plan:
        """Which parameter gets which rule and why, how its state is kept, and the RMS of its update at the current `lr`.

        The update is previewed on `grads`, by default the gradients that stand in the parameters; without any, on standard
        normal ones; a tensor that must be fed and was not counts as ones, as does a loss that a rule needs. Nothing is changed.
        `print(opt.plan())` shows a table.
        """
        held = dict(self._feeds)
        for name in {name for rule in self._rules.values() for link in rule for name in link.feeds} - set(held):
            self._feeds[name] = {id(m.tensor): torch.ones(m.local.shape, device=m.device) for m in self._current().members}
        try:
            named = zip(self._described, self._reasons, strict=True)
            why = {p.name: reason for ps, reasons in named for p, reason in zip(ps, reasons, strict=True)}
            members = self._current().members
            return Plan.of(members, [why[m.spec.name] for m in members], self.preview, grads)
        finally:
            self._feeds = held

    def state_bytes(self) -> int:
        """Bytes of state that this process holds."""
        self._current()
        kept = [(key, value) for state in self.state.values() for key, value in state.items()]
        return sum(storage.nbytes(value) for key, value in kept if key != "step")

    # -- saving -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch's. State at rest, which takes no memory, is written out: what loads it may copy into it."""
        saved = super().state_dict()
        if not any(isinstance(v, Tensor) and storage.rests(v) for slots in saved["state"].values() for v in slots.values()):
            return saved
        whole = {
            index: {key: storage.dense(v) if isinstance(v, Tensor) else v for key, v in slots.items()}
            for index, slots in saved["state"].items()
        }
        return {**saved, "state": whole}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of an optimizer with the same rules, formats and parameters, bit for bit.

        Every slot is restored in its own dtype, into the tensors that are there.

        Raises:
            ValueError: naming the group, parameter, slot, shape or dtype that differs; nothing is changed then.
        """
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        self._current()
        resume.load(self.param_groups, self.state, state_dict)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        kept = (
            "defaults",
            "state",
            "param_groups",
            "_options",
            "_routes",
            "_rules",
            "_base",
            "_groups",
            "_described",
            "_reasons",
            "_ready",
            "_kept",
        )
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._engine, self._feeds = None, {}


def _name(rule: Transform) -> str:
    links = chain_of(rule).links
    return "+".join(type(link).__name__ for link in links)
