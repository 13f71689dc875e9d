"""Rules driven in a subspace: on a small projection of the gradient, so that their state is small."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from poise.linalg.projectors import PLACES, Projector

from ..transform import Context, Param, Slot, State, Transform

OnRefresh = Literal["keep", "rotate", "reset"]
Residual = Literal["none", "sign", "sgd"]


class projected(Transform):
    r"""A rule driven on the projected gradient; a rule without state on what the projection leaves, if asked for.

    For each matrix (rows = outputs; a convolution as (out, in * kernel), each of stacked experts on its own), with P the basis
    and `project`, `back` those of the projector:

        u <- proj_scale ( back( rule( project(u) ) ) + inactive_scale f( u - back(project(u)) ) )

    with `f(r) = 0` ("none"), `sign(r)` or `r` ("sgd"). Before steps 1, gap + 1, 2 gap + 1, ... of the parameter a new basis is
    taken, of the gradient of this step or of random numbers, and the rule's state

    - "keep": stays what it is, and is read in the new basis. Each singular vector is turned towards the one in its place before
      it, so that at least arbitrary signs do no harm.
    - "rotate": is carried over with `T = P_new P_old^T`: signed state as `T m`, second moments as `T^2 v`, squared entry by
      entry, which is what they would be if the entries were independent. What lies outside the new subspace is lost.
    - "reset": begins anew, and so does the rule's count of steps.

    Args:
        inner: the rule. It sees matrices of the small shape, or with a projector onto entries a vector.
        projector: see `poise.linalg.projectors`.
        update_proj_gap: steps between new subspaces.
        on_refresh: see above.
        proj_scale: a factor of the update, beside lr.
        residual: f. inactive_scale: its factor.

    State: `basis`, beside the inner rule's of the small shape. In a state format, both are encoded; places never are. Where a
    parameter is sharded along its rows and its columns are projected, the inner state is sharded too; the basis, and state of
    fewer rows, every rank keeps whole.

    Raises:
        ValueError: for a setting that is none of these.

    Sources: "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection" (arXiv 2403.03507) and, for the residual,
    "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead" (arXiv 2411.07837).
    """

    unit = "matrix"

    def __init__(
        self,
        inner: Transform,
        projector: Projector,
        update_proj_gap: int = 200,
        on_refresh: OnRefresh = "keep",
        proj_scale: float = 1.0,
        residual: Residual = "none",
        inactive_scale: float = 1.0,
    ) -> None:
        check_gap(update_proj_gap)
        check_residual(residual)
        if on_refresh not in get_args(OnRefresh):
            raise ValueError(f"on_refresh={on_refresh!r}: must be one of {', '.join(map(repr, get_args(OnRefresh)))}")
        self.inner, self.every, self.blind = (inner,), update_proj_gap, inner.blind
        self.projector, self.on_refresh = projector, on_refresh
        self.residual: Residual = residual
        self.defaults = scale_defaults(proj_scale, inactive_scale, residual)

    def slots(self, p: Param) -> dict[str, Slot]:
        shape = (*_experts(p), *self.projector.basis_shape(*p.matrix))
        if self.projector.kind in PLACES:
            return {"basis": Slot(shape, torch.int64, kind="exact", dims=(None,) * len(shape))}
        return {"basis": Slot(shape)}

    def parts(self, p: Param) -> tuple[Param, ...]:
        shape = torch.Size((*_experts(p), *self.projector.small_shape(*p.matrix)))
        role = "experts" if _experts(p) else "matrix" if len(shape) > 1 else "vector"
        return (replace(p, shape=shape, role=role, heads=None, splits=(), inputs_first=False),)

    def follows(self, p: Param) -> tuple[tuple[int | None, ...] | None, ...]:
        batch, small = len(_experts(p)), self.projector.small_shape(*p.matrix)
        rows, columns = (batch + 1, batch) if p.inputs_first else (batch, batch + 1)
        sides = (rows, columns if len(p.shape) == batch + 2 else None)  # the columns of a convolution are no one dimension
        kept = [side if size == whole else None for side, size, whole in zip(sides, small, p.matrix, strict=False)]
        return ((*range(batch), *(kept if len(small) > 1 else [None])),)

    def inner_step(self, step: int) -> int:
        return (step - 1) % self.every + 1 if self.on_refresh == "reset" else step

    def refresh(self, u: Tensor, state: State, x: Tensor, k: Context) -> None:
        m, n = u.shape[-2:]
        old, new = state["basis"], self.projector.basis(u, _uniform(self.projector.draws(m, n), k))
        if self.on_refresh == "reset":
            k.inner[0].reset()
        elif k.step > 1 and self.on_refresh == "rotate":
            small = self.projector.small_shape(m, n)

            def carried(t: Tensor, squared: bool = False) -> Tensor:
                if tuple(t.shape[t.ndim - len(small) :]) != small:
                    return t  # means over rows or columns have no coordinates to be carried over
                return self.projector.carry(t, old, new, m, n, squared=squared)

            k.inner[0].rebase(carried, lambda t: carried(t, squared=True))
        elif k.step > 1:
            new = self.projector.aligned(new, old, m, n)
        state["basis"] = new

    def enter(self, u: Tensor, state: State, x: Tensor, k: Context) -> tuple[Tensor | None, ...]:
        return (self.projector.project(u, state["basis"]),)

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        small, (m, n) = self.projector.project(u, state["basis"]), u.shape[-2:]
        out = self.projector.back(k.inner[0].apply(small), state["basis"], m, n)
        if self.residual != "none":
            out = out + k.inactive_scale * without_state(self.residual, u - self.projector.back(small, state["basis"], m, n))
        return k.proj_scale * out

    def update_rms(self, p: Param) -> float | None:
        (part,) = self.parts(p)
        inside, share = self.inner[0].update_rms(part), part.shape.numel() / max(p.shape.numel(), 1)
        if inside is None or self.residual == "sgd":
            return None
        outside = 0.0
        if self.residual == "sign":  # of vectors the residual has no entries that are zero
            outside = self.defaults["inactive_scale"] ** 2 * (1 - share if self.projector.kind in PLACES else share < 1)
        return self.defaults["proj_scale"] * (share * inside**2 + outside) ** 0.5

    def __repr__(self) -> str:
        return (
            f"projected({self.inner[0]!r}, {self.projector!r}, {self.every}, on_refresh={self.on_refresh!r}, "
            f"residual={self.residual!r})"
        )


class residual_only(Transform):
    """`u <- proj_scale inactive_scale f(u)`: what is left of `projected` where nothing is projected.

    Args: as of `projected`.
    """

    blind = True

    def __init__(self, residual: Residual = "sign", proj_scale: float = 1.0, inactive_scale: float = 1.0) -> None:
        check_residual(residual)
        self.residual: Residual = residual
        self.defaults = scale_defaults(proj_scale, inactive_scale, residual)

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return k.proj_scale * k.inactive_scale * without_state(self.residual, u)

    def update_rms(self, p: Param) -> float | None:
        return None if self.residual == "sgd" else self.defaults["proj_scale"] * self.defaults["inactive_scale"]


def without_state(residual: Residual, r: Tensor) -> Tensor:
    """The rule for what no state is kept of."""
    if residual == "none":
        return torch.zeros_like(r)
    return torch.sign(r) if residual == "sign" else r


def check_gap(gap: int, name: str = "update_proj_gap") -> None:
    """At least 1, or ValueError."""
    if gap < 1:
        raise ValueError(f"{name}={gap}: must be at least 1")


def check_residual(residual: str) -> None:
    """One of the rules without state, or ValueError."""
    if residual not in get_args(Residual):
        raise ValueError(f"residual={residual!r}: must be one of {', '.join(map(repr, get_args(Residual)))}")


def scale_defaults(proj_scale: float, inactive_scale: float, residual: Residual) -> dict[str, float]:
    """The two factors as hyper-parameters; without a residual, there is one."""
    for name, value in (("proj_scale", proj_scale), ("inactive_scale", inactive_scale)):
        if not value >= 0.0:
            raise ValueError(f"{name}={value}: must not be negative")
    return {"proj_scale": proj_scale} | ({} if residual == "none" else {"inactive_scale": inactive_scale})


def _experts(p: Param) -> tuple[int, ...]:
    return tuple(p.shape[:-2]) if p.role == "experts" else ()


def _uniform(count: int, k: Context) -> Tensor | None:
    """So many uniform numbers for each matrix."""
    if count == 0:
        return None
    drawn = [k.uniform().flatten(-2)]
    while sum(part.shape[-1] for part in drawn) < count:
        drawn.append(k.uniform().flatten(-2))
    return torch.cat(drawn, -1)


__all__ = ["OnRefresh", "Residual", "projected", "residual_only"]
