"""The protocol: an update rule is a `Transform`, one step of it written once, as plain tensor math for ONE tensor.

A rule declares what it keeps (`slots`) and says how an incoming update `u` (the gradient, for the first link of a chain)
becomes a new one (`update`). How it is run, compiled, stored in few bits, sharded and saved is the engine's business: no rule
knows of it, and no rule is written a second time for speed.

    class momentum(Transform):
        def slots(self, p):
            return {"momentum_buffer": Slot(p.shape)}
        def update(self, u, state, x, k):
            state["momentum_buffer"] = k.momentum * state["momentum_buffer"] + u
            return state["momentum_buffer"]

The contract:

- `u`, `x` (the parameter) and the state arrive in float32 (float64 for float64 parameters), whatever the formats they are kept
  in. A rule assigns new values to `state[...]`; it never writes into `u`, `x` or `k.grad`. Where nothing is compiled it may
  write into a state tensor, and then assigns it to its own name: a row of a window is written without copying the others.
- What `unit` says decides the shape it sees: "element" rules see any flat piece of a tensor and must treat every element alike;
  "block" rules see `(blocks, elements)`, some equal blocks of neighbouring elements, and must treat every block alike;
  "matrix" rules see `(..., rows, columns)` with outputs as rows, one matrix or several equal ones at once; "tensor" rules see
  the whole parameter; "piece" rules as much of it as this process holds, and must treat every element alike; "layer" rules see
  a layer's weight and bias as one matrix `[W as (out, in * kernel) | b]`.
- Everything that changes from step to step, learning rate and bias corrections included, comes through `scalars`, which is
  computed on the host in float64 and read as attributes of `k`: a Python number in `update` is baked into the compiled kernel.
- `update` returns the new update. After the last link the engine adds it to the weights: descent directions are therefore
  turned and scaled by `scale_by_lr()`, which `Optimizer` appends unless the rule `owns_step`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

Unit = Literal["element", "block", "matrix", "tensor", "piece", "layer"]
State = MutableMapping[str, Tensor]
ROLES = ("matrix", "conv", "experts", "embedding", "head", "norm", "bias", "vector", "scalar")


@dataclass(frozen=True)
class Param:
    """What routing found about one parameter, and all that a rule may know of the model."""

    name: str  # without module. / _orig_mod. / _fsdp_wrapped_module. prefixes
    shape: torch.Size  # of the whole parameter, also where this process holds only a shard
    dtype: torch.dtype
    role: str = "matrix"  # one of ROLES
    heads: int | None = None  # attention heads, where the module says so
    layer: str | None = None  # the module that owns it: a weight and its bias share it
    index: int = 0  # place among the parameters of its rule,
    count: int = 1  # of this many
    splits: tuple[int, ...] = ()  # rows of each part of a fused projection (q, k, v stored as one), empty: not fused
    tied: bool = False  # used in more than one place
    bias: bool = False  # as rules of unit "layer" see a layer: whether the last column of the joint matrix is its bias
    inputs_first: bool = False  # stored (in, out, ...): transposed convolutions, GPT-2's Conv1D, some stacked experts

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows (outputs) and columns (inputs, times a convolution's kernel) as a matrix rule sees them; of one expert."""
        if self.role == "experts":
            rows, columns = self.shape[-2:]
        else:
            rows, columns = self.shape[0], math.prod(self.shape[1:])
        if not self.inputs_first:
            return rows, columns
        return (columns, rows) if self.role == "experts" else (self.shape[1], self.shape[0] * math.prod(self.shape[2:]))


@dataclass(frozen=True)
class Slot:
    """One piece of state, declared, so that it is planned, sharded, encoded and saved before it exists.

    Args:
        shape: of the whole parameter's slot.
        dtype: of the values a rule sees, float32 unless said otherwise (float64 parameters get float64 for float32).
        init: a number everywhere, "eye" (batched identity) or "param" (a copy of the parameter).
        kind: "signed"; "nonneg" (a second moment); "upper" (rounded up, never down); "exact" (never encoded: indices, bases).
        dims: which parameter dimension each state dimension follows when the parameter is sharded; None for a dimension that
            every rank keeps whole. By default a slot of the parameter's own shape follows it and any other is kept whole.
        codec: the rule's own state format, which beats the user's.
        shared: one for all parameters of this link; only `reduce` sees it.
        resting: takes no memory before it is first written; `Transform.rests` sets it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    init: float | Literal["eye", "param"] = 0.0
    kind: Literal["signed", "nonneg", "upper", "exact"] = "signed"
    dims: tuple[int | None, ...] | None = None
    codec: str | None = None
    shared: bool = False
    resting: bool = False


class Transform:
    """One link of a rule. Subclasses set the attributes and override the methods they need; `update` is the only must."""

    unit: ClassVar[Unit] = "element"
    reads: Literal["grad", "update"] = "grad"  # what measure() is given: the raw gradient, or the update that reaches this link
    absent: Literal["skip", "zeros"] = "skip"  # a parameter without gradient is left out of the totals, or counts as zeros
    feeds: tuple[str, ...] = ()  # tensors that opt.feed() must have given before the step
    fed_by: str = ""  # what else a user can do than to call opt.feed(), for the error where nobody did
    may_feed: tuple[str, ...] = ()  # those it may have given: None in k for a parameter that got none; not of unit "layer"
    needs_loss: bool = False  # step() must be given a closure that returns the loss, which is then k.loss
    inner: tuple[Transform, ...] = ()  # rules this one drives inside a split, a rotation, a preconditioner
    every: int = 0  # period of refresh(); 0: never
    owns_step: bool = False  # returns the displacement itself: no learning rate and no decay are appended
    blind: bool = False  # update() looks at u alone: neither gradient nor weights are gathered (or, for inner, carried over)
    rests: bool = False  # with inner: their state takes memory only from their first call to `k.inner[i].rest()`, and so on
    pure: bool = False  # (as inner rule) statistics are kept in measure(), so update() may be applied to many vectors
    defaults: Mapping[str, Any] = {}  # hyper-parameters: they appear in the optimizer's groups under these names

    def slots(self, p: Param) -> dict[str, Slot]:
        """The state kept for one parameter."""
        return {}

    def fed_shapes(self, p: Param) -> dict[str, tuple[int, ...]]:
        """Shapes of what it is fed that has not the parameter's, of units "matrix" and "tensor".

        Such a tensor is fed whole on every rank, and seen as it was fed.
        """
        return {}

    def blocks(self, p: Param) -> tuple[tuple[int, int], ...] | None:
        """With unit "block": the parameter's blocks as runs `((count, elements), ...)`, from its first element on.

        So many equal blocks of neighbouring elements, then those of the next run; None: each element is one. Elements come in
        the order of the parameter with its outputs first, however it is stored; of stacked experts, one expert after another.
        The rule sees `(blocks, elements)`, some of one run: `u`, `x`, `k.grad`, what is fed, and its slots of the parameter's
        shape. Its other slots hold one value for each block, in their order and in whatever shape, and it sees `(blocks, 1)`
        of them; they are never encoded.

            rows:                       ((rows, columns),)
            heads, of a norm one:       ((heads, head_dim * columns),),    ((1, elements),)
            q and k by heads, v by rows of (3 * width, width):   ((2 * heads, head_dim * width), (width, width))

        Element links before and after run in the same kernel. Where a shard holds whole blocks, all of one length and as many
        for each index of the first dimension, and the slots for them begin with that dimension, it is worked on where it is;
        else the parameter is gathered. A block rule has no inner rules, no refresh() and no written().
        """
        raise NotImplementedError(f"{type(self).__name__}.blocks")

    def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float] | None:
        """Numbers of this step, from the parameter's step count (1 at the first) and its group's hyper-parameters.

        Runs on the host in float64. None means that this step only gathers (measure and refresh run, nothing is written).
        By default every hyper-parameter in `defaults` is passed on under its own name.
        """
        return {name: float(hyper[name]) for name in self.defaults}

    def measure(self, u: Tensor, state: State, x: Tensor, k: Context) -> dict[str, Tensor]:
        """Phase one, per parameter: 0-d tensors that `reduce` gets the totals of; may write state. {} costs nothing.

        An "element" or "piece" rule sees pieces, so what it returns must be sums over elements, and a "block" rule's over
        blocks: pieces and shards are added. Where nothing is compiled, vectors may be measured too, of one length for all.
        """
        return {}

    def reduce(self, totals: dict[str, Tensor], shared: State, k: Context) -> dict[str, Tensor]:
        """Once per link and step, on the totals over all its parameters and ranks: what `k.total` holds in `update`.

        Where a sum does not say enough (a maximum, a median), `k.each` has what every parameter measured.

        A result named "skip", if true, abandons the whole step before anything has changed. Only a link that measures the raw
        gradient and keeps no state of its own per parameter may return it.
        """
        return totals

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        """Phase two: the new update."""
        raise NotImplementedError(f"{type(self).__name__}.update")

    def refresh(self, u: Tensor, state: State, x: Tensor, k: Context) -> None:
        """Rare, expensive work (a decomposition, a new subspace), done eagerly BEFORE the step, on the raw gradient."""

    def due(self, step: int) -> bool:
        """Whether `refresh` runs before this step: 1, every+1, 2*every+1, ..."""
        return self.every > 0 and (step - 1) % self.every == 0

    def written(self, error: Tensor, state: State, x: Tensor, k: Context) -> None:
        """Told after the write what rounding kept from the weights (wanted minus written). Top-level rules only."""

    def parts(self, p: Param) -> tuple[Param, ...]:
        """With `inner`: the parameter that each inner rule believes it sees."""
        return (p,) * len(self.inner)

    def follows(self, p: Param) -> tuple[tuple[int | None, ...] | None, ...]:
        """With `inner`: for each part, the parameter's dimension that each of its own follows when sharded, as `Slot.dims`.

        The state of inner rules is then sharded too. None: the part has the parameter's dimensions, or its state is kept whole.
        """
        return (None,) * len(self.inner)

    def enter(self, u: Tensor, state: State, x: Tensor, k: Context) -> tuple[Tensor | None, ...]:
        """With `inner`: what each inner rule is fed; None: not run now. Pure and linear: gradient and weights pass it too.

        Where all inner rules are blind, it is not called for an update: they are given `u` by `apply` and see nothing else.
        """
        return (u,) * len(self.inner)

    def inner_step(self, step: int) -> int:
        """With `inner`: the step count that inner rules are told, less than the rule's own if its first calls only gather."""
        return step

    def update_rms(self, p: Param) -> float | None:
        """Root mean square of an entry of this link's output, where the rule fixes it; None: it is what u's was."""
        return None

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.defaults.items())
        return f"{type(self).__name__}({settings})"


class Chain(Transform):
    """Links applied one after another. Made by `chain`; the engine takes it apart, so it has no math of its own."""

    def __init__(self, links: tuple[Transform, ...]) -> None:
        self.links = links
        self.defaults = merge_defaults(links)

    @property
    def owns_step(self) -> bool:  # type: ignore[override]
        return self.links[-1].owns_step

    def __iter__(self) -> Iterator[Transform]:
        return iter(self.links)

    def __repr__(self) -> str:
        return f"chain({', '.join(map(repr, self.links))})"


def chain(*links: Transform) -> Chain:
    """Apply `links` from left to right; chains inside it are taken apart.

    Totals are shared by identity: where the same link object stands in two chains, it is one link over both's parameters.
    """
    flat: list[Transform] = []
    for link in links:
        if not isinstance(link, Transform):
            raise TypeError(f"chain(): every link must be a Transform, got {link!r}")
        flat.extend(link.links if isinstance(link, Chain) else (link,))
    if not flat:
        raise ValueError("chain(): at least one link is needed")
    for link in flat[:-1]:
        if link.owns_step:
            raise ValueError(f"chain(): {link!r} returns the displacement itself (owns_step), so it must be the last link")
    return Chain(tuple(flat))


def merge_defaults(links: tuple[Transform, ...]) -> dict[str, Any]:
    """The hyper-parameters of several links as one group's defaults; two links may share a name only with one value."""
    merged: dict[str, Any] = {}
    for link in links:
        for name, value in {**merge_defaults(link.inner), **link.defaults}.items():
            if name in merged and merged[name] != value:
                raise ValueError(
                    f"chain(): two links call a hyper-parameter {name!r} but set it to {merged[name]!r} and {value!r}; "
                    "give one of them another name, or both the same value"
                )
            merged[name] = value
    return merged


class Context:
    """`k`: what a rule may read during one call. Scalars are attributes (`k.lr`), everything else is listed here.

    Attributes:
        grad: the raw gradient of this piece.
        total: what `reduce` returned. `own`: what `measure` returned for this very parameter.
        each: in `reduce` alone, what `measure` returned for each parameter of the link, (parameters, ...), in no fixed order.
        step: the parameter's step count, `clock`: the steps this rule has taken over all of its parameters. Both exist only
            where nothing is compiled (`refresh`, `reduce`, and rules of unit "matrix", "tensor", "piece", "layer").
        loss: the loss, if the closure gave one, else None.
        param: the `Param` (not in "element" and "block" rules, whose kernels serve all; of a batch of equal matrices, the
            first's).
        inner: handles of the inner rules, each with `apply(v)`, and in `refresh` `reset()`, `rebase(f, squared)` and `rest()`.
    """

    grad: Tensor
    total: Mapping[str, Tensor]
    own: Mapping[str, Tensor]
    each: Mapping[str, Tensor]
    loss: Tensor | None
    inner: tuple[Any, ...]
    param: Param

    def __init__(self, scalars: Mapping[str, Any], **known: Any) -> None:
        self._scalars = scalars
        self._noise: Callable[[], Tensor] | None = known.pop("uniform", None)
        self.__dict__.update(known)

    def uniform(self) -> Tensor:
        """Independent uniform numbers in [0, 1), one for each element of this piece.

        A function of seed, parameter name, step and GLOBAL element index: chunks, order and ranks change nothing. A second
        call in the same update returns different numbers.
        """
        if self._noise is None:
            raise RuntimeError("k.uniform() is not available in this call")
        return self._noise()

    def __getattr__(self, name: str) -> Any:
        scalars = self.__dict__.get("_scalars", {})
        if name in scalars:
            return scalars[name]
        if name in ("step", "clock", "param"):
            raise AttributeError(
                f"k.{name} is not available in compiled math, where it would be baked into the kernel; pass what you need "
                "through scalars()"
            )
        known = ", ".join(sorted([*scalars, *(n for n in self.__dict__ if not n.startswith("_"))]))
        raise AttributeError(f"k.{name} does not exist; this rule has: {known}")
