"""Two checkpoints laid side by side: which names, shapes and dtypes differ, and how far each tensor is from its other.

    found = verify(a, b, Bounds(max_error=1e-3))
    if found.broken: ...

Every verb that writes weights ends with this, on what it has written and opened again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from .checkpoint import Checkpoint
from .difference import Difference, difference
from .structure import describe

if TYPE_CHECKING:
    from .outputs import Divergence

SCHEMA = 1


@dataclass(frozen=True)
class Bounds:
    """What must hold of B beside A; None: whatever it is.

    Attributes:
        max_error: largest |b - a| of any entry of any tensor.
        max_kl: largest Kullback-Leibler divergence, in nats, of B's next-token distribution from A's, mean over positions.
        max_loss_increase: B's loss minus A's.
    """

    max_error: float | None = None
    max_kl: float | None = None
    max_loss_increase: float | None = None


@dataclass(frozen=True)
class Comparison:
    """What was found.

    Attributes:
        only_a, only_b: names that the other has neither stored nor tied.
        reshaped: name -> the two shapes.
        tensors: of the names both have in one shape, in A's order.
        outputs: how far the two models' outputs are apart; None where it was not measured, for the reason `outputs_missing`.
        losses: of A and B on the task; None where there is none.
        broken: each bound that does not hold, and where; empty if all is well.
    """

    only_a: list[str]
    only_b: list[str]
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    tensors: list[Difference]
    outputs: Divergence | None = None
    outputs_missing: str | None = None
    losses: tuple[float, float] | None = None
    broken: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether the two hold the same names with the same bytes."""
        return not (self.only_a or self.only_b or self.reshaped) and all(one.equal for one in self.tensors)

    @property
    def worst(self) -> Difference | None:
        """The tensor with the largest error."""
        return max(self.tensors, key=lambda one: one.max_error, default=None)

    def as_dict(self) -> dict[str, Any]:
        """What `poise verify --json` prints, see `docs/inspect.md`; numbers that are nan or infinite are null."""
        return {
            "schema_version": SCHEMA,
            "equal": self.equal,
            "only_a": self.only_a,
            "only_b": self.only_b,
            "reshaped": {name: [list(a), list(b)] for name, (a, b) in self.reshaped.items()},
            "tensors": [{key: _json(value) for key, value in asdict(one).items()} for one in self.tensors],
            "outputs": None if self.outputs is None else {k: _json(v) for k, v in asdict(self.outputs).items()},
            "outputs_missing": self.outputs_missing,
            "losses": None if self.losses is None else {"a": _json(self.losses[0]), "b": _json(self.losses[1])},
            "broken": self.broken,
        }


def verify(
    a: Checkpoint,
    b: Checkpoint,
    bounds: Bounds | None = None,
    *,
    outputs: Callable[[Checkpoint, Checkpoint], Divergence] | None = None,
    score: Callable[[Checkpoint], float] | None = None,
    advance: Callable[[str], None] = lambda name: None,
) -> Comparison:
    """Compare B with A, tensor by tensor a few rows at a time, and judge it by `bounds`.

    Names that one lacks, shapes that differ, and entries that stopped being finite break every comparison. A bound of which
    the measure could not be taken is broken too: nothing shows that it holds.

    Args:
        outputs: measures the divergence of outputs, see `outputs.diverge`; a ValueError of it becomes `outputs_missing`.
        score: the loss of a model with a checkpoint's weights.
        advance: told each tensor's name before it is read.
    """
    bounds = bounds or Bounds()
    names_a, names_b = resolved(a), resolved(b)
    head_a, head_b = describe(a).tied, describe(b).tied
    for here, names, there in ((head_a, names_a, head_b), (head_b, names_b, head_a)):
        if here.shared and here.embedding is not None and there.head is not None:
            names.setdefault(there.head, here.embedding)  # where the other stores a head, this one's embedding is it
    shared = [name for name in names_a if name in names_b]
    reshaped, tensors, seen = {}, [], set[tuple[str, str]]()
    for name in shared:
        pair = (names_a[name], names_b[name])
        if pair in seen:
            continue
        seen.add(pair)
        advance(name)
        left, right = a.info(names_a[name]), b.info(names_b[name])
        if left.shape != right.shape:
            reshaped[name] = (tuple(left.shape), tuple(right.shape))
        else:
            tensors.append(difference(a, names_a[name], b, names_b[name], name))
    # A name that is tied is no tensor of its own: the other's model ties it too, unless it would begin with a random head.
    only_a = [name for name in (names_a if head_b.problem else a) if name not in names_b]
    only_b = [name for name in (names_b if head_a.problem else b) if name not in names_a]
    diverged, missing = None, "not asked for" if outputs is None else None
    if outputs is not None:
        if reshaped or only_a or only_b:
            missing = "the two are not of one model"
        else:
            try:
                diverged = outputs(a, b)
            except ValueError as error:
                missing = str(error)
    losses = None if score is None else (score(a), score(b))
    found = Comparison(only_a, only_b, reshaped, tensors, diverged, missing, losses)
    found.broken.extend(judge(found, bounds))
    return found


def judge(found: Comparison, bounds: Bounds) -> list[str]:
    """Each bound that `found` breaks, in one line that says by what and where."""
    broken = [f"only in A: {name}" for name in found.only_a] + [f"only in B: {name}" for name in found.only_b]
    broken += [f"{name}: shape {list(a)} in A, {list(b)} in B" for name, (a, b) in found.reshaped.items()]
    for one in found.tensors:
        if one.new_bad:
            count = f"{one.new_bad:,} entries are" if one.new_bad > 1 else "an entry is"
            broken.append(f"{one.name}: {count} finite in A and not in B, as at {list(one.at or ())}")
        elif bounds.max_error is not None and not one.max_error <= bounds.max_error:
            at = "" if one.at is None else f" at {list(one.at)}: {one.a:.6g} in A, {one.b:.6g} in B"
            broken.append(f"{one.name}: error {one.max_error:.3g} is above max_error {bounds.max_error:g}{at}")
    if bounds.max_kl is not None:
        if found.outputs is None or found.outputs.kl is None:
            why = found.outputs_missing or "the models give no logits"
            broken.append(f"max_kl {bounds.max_kl:g}: the divergence could not be measured: {why}")
        elif not found.outputs.kl <= bounds.max_kl:
            broken.append(
                f"outputs: KL {found.outputs.kl:.3g} is above max_kl {bounds.max_kl:g}; at worst {found.outputs.worst_kl:.3g}, "
                f"at position {list(found.outputs.at)}"
            )
    if bounds.max_loss_increase is not None:
        if found.losses is None:
            broken.append(f"max_loss_increase {bounds.max_loss_increase:g}: no task was given to measure a loss on")
        elif not found.losses[1] - found.losses[0] <= bounds.max_loss_increase:
            rise = found.losses[1] - found.losses[0]
            broken.append(
                f"loss: {found.losses[0]:.6g} with A, {found.losses[1]:.6g} with B: {rise:+.3g} is above max_loss_increase "
                f"{bounds.max_loss_increase:g}"
            )
    return broken


def resolved(checkpoint: Checkpoint) -> dict[str, str]:
    """Every name that a checkpoint answers to, tied ones too, with the name that is stored."""
    return {**{name: name for name in checkpoint}, **checkpoint.ties}


def _json(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
