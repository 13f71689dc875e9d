"""What goes round a step is an optimizer too: the `torch.optim.Optimizer` around another one."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import keeping

# What torch.optim.Optimizer keeps for every instance beside groups and state. A copy starts without hooks, as torch's do.
HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
DRIVERS = "drivers"  # the key of a state_dict under which drivers keep their own, outermost first


class Driver(torch.optim.Optimizer):
    """An optimizer around an optimizer, for schedulers, hooks, closures, checkpoints and trainers an ordinary one.

        opt = SAM(AdamW(model, lr=1e-3))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 1000)
        opt.step(closure)

    `param_groups`, `state` and `defaults` are those of the inner optimizer, not copies. Hooks belong to the optimizer that they
    were registered on: those of the driver run around the whole step, those of the inner one around its own step inside.
    `state_dict()` is the inner one's with the key "drivers" beside "state" and "param_groups". Drivers may stand around
    drivers.

    To write one, subclass it and define `drive`, one step; the class attributes and the other methods only where needed:

        class Lookahead(Driver):
            def __init__(self, opt, every=5, alpha=0.5):
                self.every, self.alpha = every, alpha
                super().__init__(opt, own={"step": 0, "slow": []})
            def adopt(self, params):
                self.own["slow"] += [p.detach().clone() for p in params]
            def drive(self, closure):
                loss = self.inner_step(closure)
                self.own["step"] += 1
                if self.own["step"] % self.every == 0:
                    for p, slow in zip(self.parameters(), self.own["slow"]):
                        p.copy_(slow.lerp_(p, self.alpha))
                return loss

    - `drive(closure)` runs without autograd and returns the loss. Every path through it ends in one step of the inner
      optimizer, or says why not. A closure is called with gradients on (`passes.py`); weights that it moves for a while come
      back bit for bit.
    - `own` is all that the driver remembers from step to step: dicts and lists of tensors, numbers and strings. Its keys and
      the shapes of its tensors are there from the beginning and stay; one list entry for each parameter is made in `adopt`, in
      the order of the groups. It is saved, strictly loaded, copied and counted without a line of yours.
    - Settings that may differ between groups or follow a schedule go into `defaults` and stand in `param_groups` under their
      names, or as `lookahead_alpha` if the inner optimizer has an alpha of its own; `self.hyper(group, "alpha")` reads them.
      Others are plain attributes: a resumed run has those that it was built with.
    - Random draws are functions of a seed and of a count in `own`, so that a resumed run and every rank draw the same.

    Args:
        opt: any torch.optim.Optimizer, or another driver.
        defaults: hyper-parameters of the driver, written into every group.
        own: see above.

    Raises:
        TypeError: if `opt` is no optimizer.
        ValueError: if a hyper-parameter's name is taken, or the inner optimizer cannot be driven in this way.
    """

    needs_closure: ClassVar[bool] = False  # step() must be given a closure
    gives_gradients: ClassVar[bool] = False  # calls the closure itself; the inner optimizer steps on the gradients that gave

    def __init__(
        self,
        opt: torch.optim.Optimizer,
        defaults: Mapping[str, Any] | None = None,
        own: Mapping[str, Any] | None = None,
    ) -> None:
        name = type(self).__name__
        if not isinstance(opt, torch.optim.Optimizer):
            raise TypeError(f"{name}(opt={type(opt).__name__}): opt must be a torch.optim.Optimizer, such as poise.optim.AdamW")
        if self.gives_gradients and _wants_closure(opt):
            raise ValueError(
                f"{name}(opt={type(opt).__name__}): the inner optimizer takes gradients by itself and would undo those it is "
                f"given; put {name} inside: {type(opt).__name__}({name}(...))"
            )
        self.inner = opt
        self.own: dict[str, Any] = dict(own or {})
        taken = {key for one in _nest(opt) for key in (one._hyper if isinstance(one, Driver) else one.defaults)}
        # a rule may have a rho of its own: then SAM's stands in the groups as sam_rho
        self._keys = {key: f"{name.lower()}_{key}" if key in taken else key for key in defaults or {}}
        self._hyper = {self._keys[key]: value for key, value in (defaults or {}).items()}
        for key in self._hyper:
            if key in taken:
                raise ValueError(f"{name}: the inner optimizer has a hyper-parameter {key!r} of its own")
        for group in opt.param_groups:
            group.update(self._hyper)
        self._adopted = 0
        self._surface()
        self._catch_up()

    # -- what a driver defines ----------------------------------------------------------------------------------------

    def drive(self, closure: Callable[[], Any] | None) -> Any:
        """One step; returns the loss, if the closure gave one."""
        raise NotImplementedError(f"{type(self).__name__}.drive")

    def adopt(self, params: Sequence[Tensor]) -> None:
        """Told of parameters that it has not seen: all of them at first, then those of every group added later."""

    def before_loading(self, own: Mapping[str, Any]) -> None:
        """Told what `own` is about to become, before the inner optimizer loads its state; nothing has been changed yet."""

    def evaluating(self) -> AbstractContextManager[None]:
        """Within it, the model's weights are those to evaluate and to export. Afterwards they are the training's, bit for bit.

        For most drivers they are the same. What is saved by `state_dict` does not depend on it.
        """
        return self.inner.evaluating() if isinstance(self.inner, Driver) else nullcontext()

    # -- what it gives to those who define one ------------------------------------------------------------------------

    @property
    def base(self) -> torch.optim.Optimizer:
        """The innermost optimizer, which is no driver: `opt.base.plan()`."""
        return list(_nest(self))[-1]

    def parameters(self) -> list[Tensor]:
        """Every parameter, in the order of the groups."""
        return [p for group in self.param_groups for p in group["params"]]

    def hyper(self, group: Mapping[str, Any], name: str) -> Any:
        """The driver's hyper-parameter `name` in a group."""
        return group[self._keys[name]]

    def inner_step(self, closure: Callable[[], Any] | None) -> Any:
        """One step of the inner optimizer."""
        return self.inner.step() if closure is None else self.inner.step(closure)

    # -- the surface of torch.optim.Optimizer -------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step. `closure` clears the gradients, computes the loss, calls backward and returns the loss."""
        if closure is None and self.needs_closure:
            raise TypeError(
                f"{type(self).__name__}.step() needs a closure, because it decides when and where gradients are taken: "
                "step(closure), with a function that clears the gradients, computes the loss, calls backward and returns the "
                "loss. A GradScaler takes no closure; train in bfloat16 or float32"
            )
        self._catch_up()
        return self.drive(closure)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.inner.param_groups = groups

    @property
    def state(self) -> Any:
        return self.inner.state

    @state.setter
    def state(self, state: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.inner.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        return self.inner.defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters."""
        self.inner.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; the driver's own hyper-parameters may stand in the group beside the inner optimizer's."""
        mine = {key: param_group[key] for key in self._hyper if key in param_group}
        before = len(self.param_groups)
        self.inner.add_param_group({key: value for key, value in param_group.items() if key not in mine})
        for group in self.param_groups[before:]:
            group.update(self._hyper | mine)
        self._catch_up()

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's, with `"drivers"`: a list of what each driver keeps, outermost first."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        self._catch_up()
        found = dict(self.inner.state_dict())
        found[DRIVERS] = [{"driver": type(self).__name__, **keeping.listed(self.own)}, *found.get(DRIVERS, ())]
        for hook in self._optimizer_state_dict_post_hooks.values():
            found = hook(self, found) or found
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state_dict of the same driver around the same optimizer.

        Raises:
            ValueError: naming what differs. What the driver keeps is checked before anything is changed.
        """
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        self._catch_up()
        name, saved = type(self).__name__, list(state_dict.pop(DRIVERS, ()))
        wanted = [type(one).__name__ for one in _nest(self) if isinstance(one, Driver)]
        found = [one.get("driver") for one in saved]
        if found != wanted:
            raise ValueError(
                f"state_dict: its {DRIVERS!r} are {', '.join(map(str, found)) or 'none'}, those of this optimizer "
                f"{', '.join(wanted)}; build it with the drivers that were saved"
            )
        mine = {key: value for key, value in saved[0].items() if key != "driver"}
        keeping.check(self.own, mine, name)
        self.before_loading(mine)
        rest = saved[1:]
        self.inner.load_state_dict({**state_dict, DRIVERS: rest} if rest else state_dict)
        self.own = keeping.put(self.own, mine)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    # -- what poise's optimizers have beside --------------------------------------------------------------------------

    @torch.no_grad()
    def snapshot(self, state: bool = True, params: bool = True) -> dict[str, Any]:
        """A copy of weights and, with `state`, of everything that driver and optimizer keep, for `restore`."""
        self._catch_up()
        return {"inner": keeping.snapshot(self.inner, state, params), "own": keeping.copied(self.own) if state else None}

    @torch.no_grad()
    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Put back what `snapshot` copied, bit for bit."""
        keeping.restore(self.inner, snapshot["inner"])
        if snapshot["own"] is not None:
            self.own = keeping.put(self.own, snapshot["own"])

    def state_bytes(self) -> int:
        """Bytes that this process holds for driver and optimizer."""
        return keeping.size(self.own) + keeping.state_bytes(self.inner)

    def __repr__(self) -> str:
        return f"{type(self).__name__} around {self.inner!r}"

    # -- inside -------------------------------------------------------------------------------------------------------

    def _surface(self) -> None:
        """What `Optimizer.__init__` would make, without groups and state of its own."""
        for hooks in HOOKS:
            self.__dict__[hooks] = OrderedDict()
        self._patch_step_function()

    def _catch_up(self) -> None:
        """Adopt parameters that were added, be it to the inner optimizer directly."""
        for group in self.param_groups:
            for key, value in self._hyper.items():
                group.setdefault(key, value)
        new = self.parameters()[self._adopted :]
        if new:
            with torch.no_grad():
                self.adopt(new)
            self._adopted += len(new)

    def __getstate__(self) -> dict[str, Any]:
        dropped = (*HOOKS, "step")  # a scheduler puts a wrapper of its own over step
        return {name: value for name, value in self.__dict__.items() if name not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._surface()


def _nest(opt: torch.optim.Optimizer) -> Iterator[torch.optim.Optimizer]:
    """The optimizer and those inside it, outermost first."""
    yield opt
    while isinstance(opt, Driver):
        opt = opt.inner
        yield opt


def _wants_closure(opt: torch.optim.Optimizer) -> bool:
    """Whether the optimizer calls a closure several times, as LBFGS and some drivers do."""
    if any(isinstance(one, Driver) and one.needs_closure for one in _nest(opt)):
        return True
    base = list(_nest(opt))[-1]
    closure = inspect.signature(type(base).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty
