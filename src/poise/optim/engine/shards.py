"""DTensor parameters (FSDP2, tensor parallel): the local piece, where it lies in the whole, gathering and summing.

Everything here is the identity for plain tensors, so that the rest of the engine knows one kind of parameter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor


def is_sharded(p: Tensor) -> bool:
    """Whether `p` is a DTensor (looked up by name: importing DTensor costs a second that most users need not pay)."""
    return type(p).__name__ == "DTensor" or hasattr(p, "_local_tensor")


def local(p: Tensor) -> Tensor:
    """This rank's piece, without communication."""
    return getattr(p, "_local_tensor", p)


def box(p: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and global offset of this rank's piece of `p`."""
    if not is_sharded(p):
        return tuple(p.shape), (0,) * p.ndim
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return tuple(shape), tuple(offset)


def runs(p: Tensor) -> list[tuple[int, int, int]]:
    """Pieces (local offset, length, global index of the first element) of the local tensor that are contiguous in the whole."""
    whole, (shape, offset) = tuple(p.shape), box(p)
    if math.prod(shape) == 0:
        return []
    # the trailing dimensions that this rank holds whole, and one partly held before them, form one run
    split = len(whole)
    while split > 0 and shape[split - 1] == whole[split - 1]:
        split -= 1
    lead, length = max(split - 1, 0), math.prod(shape[max(split - 1, 0) :])
    strides = [math.prod(whole[d + 1 :]) for d in range(len(whole))]
    base = sum(o * s for o, s in zip(offset, strides, strict=True))
    starts = [base]
    for d in range(lead):
        starts = [start + i * strides[d] for start in starts for i in range(shape[d])]
    return [(i * length, length, start) for i, start in enumerate(starts)]


def index(p: Tensor) -> Tensor:
    """Global index (mod 2^32, int32) of every local element, in local order."""
    pieces = [torch.arange(start, start + length, dtype=torch.int64) for _, length, start in runs(p)]
    return _wrapped(torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int64)).to(local(p).device)


def numbered(size: int, device: torch.device) -> Tensor:
    """The same for a tensor of this size that is whole here."""
    return _wrapped(torch.arange(size, dtype=torch.int64)).to(device)


def _wrapped(flat: Tensor) -> Tensor:
    return (flat & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)


def like(p: Any, piece: Tensor, shape: Sequence[int], dims: Sequence[int | None]) -> Tensor:
    """`piece` as a tensor of global `shape` distributed as `p` is, state dimension i following parameter dimension dims[i].

    It stays on its device, as the pieces of `p` do, which FSDP2 may keep on the CPU though its mesh is one of GPUs.
    """
    if not is_sharded(p):
        return piece
    if piece.device.type == p.device_mesh.device_type:
        return _on_mesh(p, piece, shape, dims)
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    meta = TensorMeta(torch.Size(shape), _strides(shape), piece.dtype)
    spec = DTensorSpec(p.device_mesh, tuple(_placements(p, dims)), tensor_meta=meta)
    return DTensor(piece, spec, requires_grad=False)


def anew(t: Any, piece: Tensor) -> Tensor:
    """The tensor `t`, distributed as it is, with `piece` in the place of this rank's."""
    return type(t)(piece, t._spec, requires_grad=False) if is_sharded(t) else piece


def _on_mesh(p: Any, piece: Tensor, shape: Sequence[int], dims: Sequence[int | None]) -> Any:
    """The same, moved to the device of the mesh where it is elsewhere."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        piece, p.device_mesh, _placements(p, dims), run_check=False, shape=torch.Size(shape), stride=_strides(shape)
    )


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))


def _placements(p: Any, dims: Sequence[int | None]) -> list[Any]:
    from torch.distributed.tensor import Replicate

    follows = {d: i for i, d in enumerate(dims) if d is not None}
    placements = []
    for placement in p.placements:
        dim = getattr(placement, "dim", None)
        if dim is None or dim not in follows:
            placements.append(Replicate())
        else:
            placements.append(_moved(placement, follows[dim]))
    return placements


def _moved(placement: Any, dim: int) -> Any:
    """The same placement on another dimension."""
    if placement.dim == dim:
        return placement
    from torch.distributed.tensor import Shard

    return Shard(dim)


def gather(p: Any, piece: Tensor) -> Tensor:
    """The whole tensor from the pieces that the ranks hold (`piece` has the local shape of `p`); every rank must call it."""
    if not is_sharded(p):
        return piece
    from torch.distributed.tensor import DTensor

    whole = DTensor.from_local(
        piece.contiguous(), p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )
    return whole.full_tensor().to(piece.device)


def scatter(p: Tensor, whole: Tensor) -> Tensor:
    """This rank's piece of `whole`, without communication."""
    if not is_sharded(p):
        return whole
    shape, offset = box(p)
    return whole[tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))]


def cut(p: Any) -> set[int]:
    """The dimensions along which `p` is cut."""
    return {placement.dim for placement in p.placements if hasattr(placement, "dim")} if is_sharded(p) else set()


def groups(p: Any) -> tuple[Any, ...]:
    """Process groups over which the pieces of `p` add up to the whole (replicas are counted once)."""
    if not is_sharded(p):
        return ()
    return tuple(p.device_mesh.get_group(i) for i, placement in enumerate(p.placements) if hasattr(placement, "dim"))


def add_up(value: Tensor, over: tuple[Any, ...]) -> Tensor:
    """The sum of `value` over the ranks of each group in turn."""
    return reduced(value, "sum", over)


def reduced(value: Tensor, how: Literal["sum", "max"], groups: tuple[Any, ...]) -> Tensor:
    """The sum, or the largest, of `value` over the ranks of each group in turn. It may be overwritten."""
    if groups:
        import torch.distributed as dist

        op = dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX
        for group in groups:
            if value.device.type in dist.get_backend_config(group):
                dist.all_reduce(value, op, group)
                continue
            moved = value.to(torch.accelerator.current_accelerator())  # weights kept on the CPU, ranks that only GPUs connect
            dist.all_reduce(moved, op, group)
            value = moved.to(value.device)
    return value


def gather_as(p: Any, piece: Tensor, shape: Sequence[int], dims: Sequence[int | None]) -> Tensor:
    """As `gather`, for state of another shape that follows some of the parameter's dimensions."""
    if not is_sharded(p):
        return piece
    return _on_mesh(p, piece.contiguous(), shape, dims).full_tensor().to(piece.device)


def scatter_as(p: Any, whole: Tensor, shape: Sequence[int], dims: Sequence[int | None]) -> Tensor:
    """As `scatter`, for state of another shape."""
    if not is_sharded(p):
        return whole
    follows = box(p)
    pieces = [slice(None) if d is None else slice(follows[1][d], follows[1][d] + follows[0][d]) for d in dims]
    return whole[tuple(pieces)]
