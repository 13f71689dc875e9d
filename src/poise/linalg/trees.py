"""Nested dicts, lists and tuples of tensors as one vector, and back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

Tree = Any  # a tensor, or dicts, lists and tuples of trees
flatten, unflatten, tree_map = _pytree.tree_flatten, _pytree.tree_unflatten, _pytree.tree_map


def ravel(tree: Tree, batch_dims: int = 0) -> tuple[Tensor, Callable[[Tensor], Tree]]:
    """All entries of `tree` as one tensor (*batch, n), and the function that makes a tree of such a tensor.

    The vector is in the widest dtype of the leaves, float32 at least; the function gives each leaf its own dtype back.

    Args:
        tree: floating-point tensors.
        batch_dims: the number of leading dimensions that all leaves share and that are kept.

    Raises:
        TypeError: a leaf that is no tensor, or not of floating point.
        ValueError: no leaves, or leaves that do not share their leading dimensions.
    """
    leaves, spec = flatten(tree)
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            found = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise TypeError(f"a tree of floating-point tensors is needed, got a leaf of {found}")
    if not leaves:
        raise ValueError("a tree with at least one tensor is needed, got none")
    batch = leaves[0].shape[:batch_dims]
    for leaf in leaves:
        if leaf.ndim < batch_dims or leaf.shape[:batch_dims] != batch:
            shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves)
            raise ValueError(f"batch_dims={batch_dims}: all leaves must share as many leading dimensions, got {shapes}")
    dtype = torch.float32
    for leaf in leaves:
        dtype = torch.promote_types(dtype, leaf.dtype)
    shapes, dtypes = [leaf.shape for leaf in leaves], [leaf.dtype for leaf in leaves]
    sizes = [math.prod(shape[batch_dims:]) for shape in shapes]
    parts = [leaf.to(dtype).reshape(*batch, size) for leaf, size in zip(leaves, sizes, strict=True)]
    vector = parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def unravel(vector: Tensor) -> Tree:
        pieces = vector.split(sizes, -1)
        return unflatten([p.reshape(s).to(d) for p, s, d in zip(pieces, shapes, dtypes, strict=True)], spec)

    return vector, unravel


__all__ = ["Tree", "flatten", "ravel", "tree_map", "unflatten"]
