"""Weights read and written in full precision, whatever they are kept in, and moved for a while.

A bfloat16 weight of 1.0 has its neighbours 1/128 and 1/256 away, so an average or a small displacement must not be computed in
it. Each function works on this rank's piece of a sharded parameter.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from poise.memory import rounding
from poise.optim.engine import shards
from poise.optim.engine.members import LOW


def local(p: Tensor) -> Tensor:
    """This rank's piece, outside autograd."""
    return shards.local(p).detach()


def computing(dtype: torch.dtype) -> torch.dtype:
    """What averages and displacements are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def read(opt: torch.optim.Optimizer, p: Tensor) -> Tensor:
    """The weight as its optimizer sees it; under weights="split" with the lower half that the model does not."""
    low = _low(opt, p)
    return local(p).to(computing(p.dtype)) if low is None else rounding.join(local(p), low)


def write(opt: torch.optim.Optimizer, p: Tensor, value: Tensor, key: int | None = None) -> None:
    """Make `value` the weight. Where it is kept in fewer bits, to nearest, or bfloat16 stochastically, by noise from `key`."""
    low = _low(opt, p)
    if low is None:
        local(p).copy_(value if key is None else _noisy(p, value, key))
        return
    high, rest = rounding.split(value)
    local(p).copy_(high)
    low.copy_(rest)


def displace(opt: torch.optim.Optimizer, p: Tensor, move: Tensor, key: int) -> None:
    """Move what the model sees of a weight by `move`; the lower half of a split weight is left alone.

    bfloat16 is rounded stochastically, by noise from `key`: a displacement is nearly always far below its spacing, and rounded
    to nearest the model would stand where it stood.
    """
    local(p).copy_(_noisy(p, read(opt, p) + move, key))


def norm(tensors: list[Tensor]) -> Tensor:
    """The l2 norm over all elements of all tensors and ranks, as a 0-d tensor of the computing dtype."""
    return added(
        (tensor, torch.linalg.vector_norm(local(tensor), dtype=computing(tensor.dtype)).square()) for tensor in tensors
    ).sqrt()


def added(values: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum over all tensors and ranks of what was computed from this rank's piece of each: pairs of a tensor and that."""
    sums: dict[tuple[Any, ...], Tensor] = {}
    for tensor, value in values:
        groups = shards.groups(tensor)
        sums[groups] = sums[groups] + value.to(sums[groups].device) if groups in sums else value
    totals = [shards.add_up(total, groups) for groups, total in sums.items()]
    if not totals:
        return torch.zeros(())
    return torch.stack([total.to(totals[0].device) for total in totals]).sum(0)


def _noisy(p: Tensor, value: Tensor, key: int) -> Tensor:
    """`value` as `p` may hold it: of bfloat16 weights rounded stochastically."""
    if p.dtype != torch.bfloat16:
        return value
    return rounding.stochastic_bf16(value, rounding.high16(rounding.noise_bits(key, shards.index(p).reshape(value.shape))))


def _low(opt: torch.optim.Optimizer, p: Tensor) -> Tensor | None:
    low = opt.state[p].get(LOW) if p in opt.state else None
    return None if low is None else shards.local(low)
