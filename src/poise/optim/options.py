"""What every optimizer takes beside its rule's own settings: the options, their checks, and what they add to a rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypedDict, get_args

from torch import Tensor

from poise.memory import codec as codecs
from poise.memory.grid import Grid

from .engine.members import Weights
from .transform import ROLES, Chain, Param, chain
from .transforms.step import Decay, add_l2, decay, scale_by_lr

State = str | codecs.Codec | Mapping[str, str | codecs.Codec]
Backend = Literal["auto", "tiles", "inductor", "chunks", "eager"]


class Options(TypedDict, total=False):
    """Keyword options that every optimizer takes; see `Optimizer`."""

    state: State
    weights: Weights | Grid
    scale: Literal["rms"] | None
    decay_vectors: bool
    seed: int
    backend: Backend


def complete(rule: Chain, mode: Decay) -> Chain:
    """The whole chain of a rule: what the optimizer appends to it."""
    if rule.owns_step:
        return rule
    if mode == "l2":
        return chain(add_l2(), *rule.links, scale_by_lr())
    return chain(*rule.links, scale_by_lr(), decay(mode))


def rms_scale(rule: Chain, p: Param, name: str) -> float:
    """The factor that gives a rule's update the RMS of AdamW's."""
    known = [rms for link in rule if (rms := link.update_rms(p)) is not None]
    if not known:
        raise ValueError(
            f"scale='rms': the update of rule {name!r} has the gradient's own size, so no fixed factor gives it another; "
            "use a rule with a known size (Adam, Lion, Muon, ...) or leave scale out"
        )
    return 0.2 / known[-1] if known[-1] > 0 else 1.0


def check_options(options: Options, optimizer: str) -> None:
    """Options that do not exist and values that cannot work, said before anything is built."""
    unknown = set(options) - set(Options.__annotations__)
    if unknown:
        raise TypeError(f"{optimizer}: unknown option {min(unknown)!r}; known: {', '.join(Options.__annotations__)}")
    weights, scale, state = options.get("weights", "auto"), options.get("scale"), options.get("state", "fp32")
    if not isinstance(weights, Grid) and weights not in get_args(Weights):
        raise ValueError(f"weights={weights!r}: must be one of {', '.join(map(repr, get_args(Weights)))}, or a Grid")
    if scale not in (None, "rms"):
        raise ValueError(f"scale={scale!r}: must be None or 'rms'")
    seed: Any = options.get("seed", 0)
    if not isinstance(seed, int):
        raise TypeError(f"seed={seed!r}: must be an integer")
    if isinstance(state, Mapping):
        strange = set(state) - {*ROLES, "*"}
        if strange:
            raise ValueError(f"state: unknown role {min(strange)!r}; roles are {', '.join(ROLES)}, and '*' for the rest")


def check_rate(name: str, value: float | Tensor) -> None:
    """A number that is not negative, or ValueError."""
    if not float(value) >= 0.0:
        raise ValueError(f"{name}={float(value)}: must not be negative")
