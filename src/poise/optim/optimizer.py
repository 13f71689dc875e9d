"""The `torch.optim.Optimizer` around a rule: groups, state, step, state_dict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Unpack

import torch
from torch import Tensor

from . import allocation, resume
from .engine import storage
from .engine.engine import Engine
from .engine.members import Member
from .given import by_tensor, fed, ones_for, standing
from .options import Options, check_options
from .plan import Plan
from .roster import Roster
from .routing import Params, Route
from .transform import Chain, Transform
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
            Slots under 4096 elements stay in full precision. A frozen parameter has no state until it is unfrozen, and then
            begins as if it were new.
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
        check_options(options, type(self).__name__)
        self._engine: Engine | None = None
        self._feeds: dict[str, dict[int, Tensor]] = {}
        self._kept: frozenset[str] | None = None  # names of the parameters that have state and are stepped; None: all
        self._roster, entries = Roster.of(rule, {"lr": lr, "weight_decay": weight_decay}, decay, options).joined(params)
        self._ready = False
        super().__init__(entries, self._roster.defaults)
        self._ready = True
        self._create()

    # -- groups and state ---------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, as torch.optim does; they are routed like the others."""
        if not self._ready:
            super().add_param_group(param_group)
            return
        count, before = len(self.param_groups), self._roster
        self._roster, entries = before.joined([param_group])
        try:
            for entry in entries:
                super().add_param_group(entry)
            self._create()
        except Exception:
            for group in self.param_groups[count:]:
                for tensor in group["params"]:
                    self.state.pop(tensor, None)
            del self.param_groups[count:]
            self._roster = before
            raise

    def rule_of(self, group: Mapping[str, Any]) -> Chain:
        """The whole chain by which the parameters of `group` move, with learning rate and decay."""
        return self._roster.rules[group["rule"]]

    @torch.no_grad()
    def keep_only(self, params: Iterable[Tensor] | None) -> None:
        """Keep state for these parameters alone, and leave the others as they are, until it is called anew. None: for all.

        State that is dropped is gone: a parameter that comes back begins anew. That of parameters which stay is untouched, and
        the lower halves of split weights, which are weights, stay too. What a link shares over all parameters goes with the
        first that holds it. Snapshots know what was kept; a state_dict loads where the same parameters are.

        Raises:
            ValueError: for no parameters, one of another optimizer, or half of a layer that its rule sees as one.
        """
        self._keep(self._roster.chosen(self.param_groups, params))

    def _keep(self, names: frozenset[str] | None) -> None:
        """Drop the state of all other parameters, and make that which is lacking."""
        if names == self._kept:
            return
        self._kept = names
        if names is not None:
            allocation.drop(self.param_groups, self.state, names)
        self._create()

    def _create(self) -> None:
        """Give state to every parameter that needs some and has none, and make the engine."""
        members = self._roster.members(self.param_groups, self._kept)
        allocation.give(members, self.state)
        self._engine = Engine(members, self._roster.options.get("backend", "auto"))

    def _current(self) -> Engine:
        """The engine, made anew if parameters have changed their dtype or device since, or were unfrozen."""
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
        self._move(torch.tensor(loss, dtype=torch.float64) if isinstance(loss, float) else loss)
        return loss

    def _move(self, loss: Any) -> None:
        """Move the parameters that have a gradient. What goes round this in every step is done by a subclass here."""
        feeds, self._feeds = self._feeds, {}
        engine = self._current()
        kind = engine.everyone[0].device.type
        lowered = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
        with lowered:  # the precision of an update is the rule's business
            engine.step(feeds, loss if isinstance(loss, Tensor) else None)

    def feed(self, **tensors: Mapping[Any, Tensor] | Sequence[Tensor]) -> None:
        """Give the next step tensors that a rule reads beside the gradient (`Transform.feeds` and `Transform.may_feed`).

        One step uses them up. Each is a mapping from parameter, or parameter name, to a tensor of its shape (or of that which
        the rule says), or a list in the order of the groups.
        """
        self._feeds |= fed(self._current().everyone, tensors)

    @torch.no_grad()
    def preview(self, grads: Mapping[Any, Tensor] | Sequence[Tensor] | None = None) -> dict[str, Tensor]:
        """The displacement that each parameter would get from `grads` (default: the gradients that stand in them).

        Changes nothing. Returns name -> tensor in the computing dtype (this rank's piece of sharded parameters), without the
        parameters that have no gradient. A rule that needs the loss is given 1.
        """
        members = self._current().everyone
        given = None if grads is None else by_tensor(members, grads, "preview(grads)")
        before = self.snapshot(params=False)
        captured: dict[Member, Tensor] = {}
        try:
            with standing(members, given):
                self._current().step(self._feeds, None, captured)
        finally:
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
        engine, having = self._current(), resume.having(self.param_groups, snapshot)
        if having is not None and allocation.match(engine.everyone, self.state, having):
            self._create()
        resume.put_back(self.param_groups, self.state, snapshot)

    @torch.no_grad()
    def begin_anew(self, params: Iterable[Tensor] | None = None) -> None:
        """Forget everything that steps left in the state, as if none had been taken; weights and settings stay.

        The lower halves of split weights are weights. A slot that begins as the weights begins as they are now.

        Args:
            params: those whose own state begins anew; what parameters share stays then. None: all of it.
        """
        only = None if params is None else set(params)
        resume.begin(self._current().everyone, self.param_groups, only)

    def plan(self, grads: Mapping[Any, Tensor] | Sequence[Tensor] | None = None) -> Plan:
        """Which parameter gets which rule and why, how its state is kept, and the RMS of its update at the current `lr`.

        The update is previewed on `grads`, by default the gradients that stand in the parameters; without any, on standard
        normal ones; a tensor that must be fed and was not counts as ones, as does a loss that a rule needs. Nothing is changed.
        `print(opt.plan())` shows a table.
        """
        members, held = self._current().everyone, self._feeds
        self._feeds = ones_for(members) | held
        try:
            return Plan.of(members, self._roster.why(), self.preview, grads)
        finally:
            self._feeds = held

    @torch.no_grad()
    def values(self, param: Tensor) -> dict[str, Tensor]:
        """The state of one parameter as numbers, in whatever format it is kept: `opt.values(p)["exp_avg_sq"]`.

        Copies, in the dtype that the rule computes in, sharded as the parameter is; {} before it has state. What parameters
        share, and the lower halves of split weights, are not among them.

        Raises:
            ValueError: the parameter is not one of this optimizer's.
        """
        member = next((m for m in self._current().everyone if m.tensor is param), None)
        if member is None:
            raise ValueError(f"values(param): a tensor of shape {list(param.shape)} is no parameter of this optimizer")
        return allocation.values(member)

    def state_bytes(self) -> int:
        """Bytes of state that this process holds."""
        self._current()
        kept = [(key, value) for state in self.state.values() for key, value in state.items()]
        return sum(storage.nbytes(value) for key, value in kept if key != "step")

    # -- saving -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch's. State at rest, which takes no memory, is written out: what loads it may copy into it."""
        return resume.written_out(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of an optimizer with the same rules, formats and parameters, bit for bit.

        Every slot is restored in its own dtype, where it is. A frozen parameter has state afterwards if it had some when saved.

        Raises:
            ValueError: naming the group, parameter, slot, shape or dtype that differs; nothing is changed then.
        """
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        if resume.load(self._current().everyone, self.param_groups, self.state, state_dict):
            self._create()
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("defaults", "state", "param_groups", "_roster", "_ready", "_kept")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._engine, self._feeds = None, {}
