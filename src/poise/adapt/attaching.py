"""Adapters put beside layers, switched off and on, and removed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from poise import catalog
from poise.modules import become

from .adaptation import Adaptation, Draw, Losses
from .adapter import Adapted, Adapter, adapted
from .targets import Place, Targets, places

KEPT = "poise_adaptation"  # the attribute of the model


@dataclass
class Attached:
    """What `attach` did; the model keeps it.

    Attributes:
        method: with its settings.
        layers: paths of adapted layers; a layer tied to one of them is not among them.
        also: names of the model's own parameters that train too.
        trainable, total: numbers of parameters, those that layers share counted once.
        passes: forward and backward passes that were taken to look at gradients first.
        originals: of those that `also` names, the values before they trained.
    """

    method: Adaptation
    layers: tuple[str, ...]
    also: tuple[str, ...]
    trainable: int
    total: int
    trained_before: dict[str, bool] = field(repr=False)
    passes: int = 0
    originals: dict[str, Tensor] = field(default_factory=dict, repr=False)
    rewritten: str = ""  # what has changed the base's weights for good, if something has
    folded: dict[str, Tensor] = field(default_factory=dict, repr=False)  # by path: the weight as it was
    hooks: list[RemovableHandle] = field(default_factory=list, repr=False)  # of the method, on the model

    def __str__(self) -> str:
        share = self.trainable / self.total
        return f"{self.method}: {len(self.layers)} layers, {self.trainable:,} of {self.total:,} parameters train ({share:.2%})"


def attach(
    model: nn.Module,
    method: Adaptation | type[Adaptation] | str = "lora",
    targets: Targets | None = None,
    *,
    also: str | Sequence[str] = (),
    losses: Losses | None = None,
    seed: int | None = None,
    **settings: Any,
) -> Attached:
    """Put adapters beside layers of `model`, in place, and freeze all else.

        attach(model, "lora", rank=16, targets=("q_proj", "v_proj"))
        opt = poise.optim.Muon(model, lr=1e-3)             # what is frozen has no gradient and is left alone
        ...
        fold(model)                                        # or export(model, "adapter")

    Do it before you make the optimizer. Weights are never written until `fold`; each keeps its name, and adapters stand in the
    state_dict as `<layer>.adapter. ...`.

    Args:
        model: a module; it may be such a layer itself.
        method: an adaptation, its class, or its name in the catalog (`poise methods --family adapt`).
        targets: see `poise.adapt.targets.places`; None: the method's own, of most methods all hidden linear layers.
        also: names of the model's own parameters that train too, or patterns with `*` for whole names: "*norm*", "lm_head.*".
            Some methods name some by themselves. Their values at the start are kept.
        losses: functions that each give the loss of a batch, of methods that look at gradients first.
        seed: of what is drawn; None draws one from torch's global generator.
        settings: of the method, if it is given by class or name.

    Raises:
        ValueError: the model is adapted already, no such layer, a setting out of range, a missing argument.
        TypeError: an unknown setting. Nothing has been changed then.
    """
    made = _method(method, settings)
    known = attached(model)
    if known is not None:
        raise ValueError(f"model is adapted already, by {known.method}; detach(model) first, or fold(model) and then detach it")
    meant = places(model, made.default_targets(model) if targets is None else targets)
    if inside := next((name for name, layer in model.named_modules() if isinstance(layer, Adapted)), None):
        raise ValueError(f"model: {inside!r} is adapted already, as a part of another model; detach that one first")
    if made.needs_losses and losses is None:
        raise ValueError(f"{type(made).__name__} looks at gradients first: give losses=[lambda: loss of a batch, ...]")
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    trained = _matching(before, [*([also] if isinstance(also, str) else also), *made.also(model)])
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    passes = _Counted(losses or ())
    made = made.settle(model, meant, seed, passes)
    found = list(made.choose(model, meant))
    if not found:
        raise ValueError(f"targets: {made} adapts none of those layers")
    shared = made.begin(model, found, Draw(seed, "", found[0].layer.weight), passes)
    adapters = {place.path: made.adapter(place, Draw(seed, place.path, place.layer.weight), shared) for place in found}
    originals = {name: p.detach().clone() for name, p in model.named_parameters() if name in trained}
    for name, p in model.named_parameters():
        p.requires_grad_(name in trained)
    modules = dict(model.named_modules())
    for place in found:
        _put(place, adapters[place.path], modules)
    counted = {id(p): p for p in model.parameters()}.values()
    kept = Attached(
        method=made,
        layers=tuple(adapters),
        also=tuple(trained),
        trainable=sum(p.numel() for p in counted if p.requires_grad),
        total=sum(p.numel() for p in counted),
        trained_before=before,
        originals=originals,
    )
    setattr(model, KEPT, kept)
    try:
        kept.hooks = list(made.finish(model, adapters, passes) or ())
    except BaseException:
        detach(model)
        raise
    kept.passes = passes.taken
    return kept


def attached(model: nn.Module) -> Attached | None:
    """What `attach` did to this model; None if it is not adapted."""
    return model.__dict__.get(KEPT)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """By path of the layer, what stands beside it.

    Raises:
        ValueError: the model is not adapted.
    """
    kept = kept_by(model)
    return {path: _layer(model, path).adapter for path in kept.layers}


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within it the model is the base: adapters are not asked, and what of its own trained has the values from before.

    Not for a folded model, whose weights are changed.
    """
    kept = kept_by(model)
    if kept.folded:
        raise ValueError("model is folded, so that its weights are not the base's; unfold(model) first")
    found = [adapter for adapter in adapters(model).values() if adapter.active]
    for adapter in found:
        adapter.active = False
    trained = _exchange(model, kept.originals)
    try:
        yield
    finally:
        _exchange(model, trained)
        for adapter in found:
            adapter.active = True


def detach(model: nn.Module) -> nn.Module:
    """Remove the adapters, in place; returns `model`. It is the base again, or, if it was folded, what it was folded to.

    What trained before `attach` trains again. An optimizer of the adapters does not know of it.
    """
    kept = kept_by(model)
    for layer in [layer for layer in model.modules() if isinstance(layer, Adapted)]:
        held: Any = layer
        become(held, type(held).__mro__[2])
        del held.adapter
    for hook in kept.hooks:
        hook.remove()
    if not kept.folded:
        _exchange(model, kept.originals)
    for name, p in model.named_parameters():
        p.requires_grad_(kept.trained_before.get(name, p.requires_grad))
    delattr(model, KEPT)
    return model


def _exchange(model: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Write these values into parameters of the model, and return those that stood there."""
    named = dict(model.named_parameters())
    stood = {name: named[name].detach().clone() for name in values}
    for name, value in values.items():
        named[name].data.copy_(value)
    return stood


class _Counted:
    """Losses, and how many of them were asked for."""

    def __init__(self, losses: Losses) -> None:
        self.losses, self.taken = iter(losses), 0

    def __iter__(self) -> _Counted:
        return self

    def __next__(self) -> Callable[[], Tensor]:
        loss = next(self.losses)

        def counted() -> Tensor:
            self.taken += 1
            return loss()

        return counted


def _put(place: Place, adapter: Adapter, modules: dict[str, nn.Module]) -> None:
    for path in (place.path, *place.tied):
        layer: Any = modules[path]
        layer.adapter = adapter
        become(layer, adapted(type(layer)))


def _method(method: Adaptation | type[Adaptation] | str, settings: dict[str, Any]) -> Adaptation:
    if isinstance(method, Adaptation):
        if settings:
            raise TypeError(f"settings {', '.join(settings)}: the method is given with its settings already, {method}")
        return method
    if isinstance(method, str):
        known = catalog.get(method)
        method = known.target  # pyright: ignore[reportAssignmentType]
    if not (isinstance(method, type) and issubclass(method, Adaptation)):
        raise TypeError(f"method={method!r} is no adaptation; see `poise methods --family adapt`")
    return method(**settings)


def _matching(names: dict[str, bool], patterns: Sequence[str]) -> list[str]:
    found: list[str] = []
    for pattern in patterns:
        some = [name for name in names if fnmatchcase(name, pattern)]
        if not some:
            raise ValueError(f"also: {pattern!r} is the name of no parameter of the model")
        found += some
    return [name for name in names if name in found]


def kept_by(model: nn.Module) -> Attached:
    kept = attached(model)
    if kept is None:
        raise ValueError("model is not adapted; attach(model, method) first")
    return kept


def _layer(model: nn.Module, path: str) -> Any:
    return model.get_submodule(path)
