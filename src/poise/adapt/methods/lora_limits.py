"""Computational limits of LoRA: how large attention's logits are, and how much of them adapters make."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from poise.catalog import Paper, method
from poise.linalg.lengths import wide

from ..folding import folded_weight


@dataclass(frozen=True)
class Logits:
    """Largest absolute entries of one layer's scaled logits, and of what they are the sum of.

    Attributes:
        total: of (X Q')(X K')^T / sqrt(d), with the adapted Q' and K'.
        frozen: with the base's Q and K.
        linear: of what one adapter makes with the other frozen weight; times c if both adapters are multiplied by c.
        quadratic: of what both adapters make together; times c^2.
        bound: sqrt(ln L), to whose order all must stay for an almost linear algorithm to be possible.
    """

    total: float
    frozen: float
    linear: float
    quadratic: float
    bound: float

    @property
    def adapter(self) -> float:
        """The larger of the two parts that adapters make."""
        return max(self.linear, self.quadratic)


@method(
    "lora-limits",
    family="adapt",
    kind="diagnostic",
    paper=Paper("Computational Limits of Low-Rank Adaptation for Transformer-Based Models", arxiv="2406.03136", year=2024),
    mutant=("dq @ k.mT + q @ dk.mT", "dq @ k.mT"),
)
@torch.no_grad()
def lora_limits(x: Tensor, query: nn.Module, key: nn.Module, heads: int, key_heads: int | None = None) -> Logits:
    """How large the logits of an attention layer are, in parts of the base and of its adapters, beside sqrt(ln L).

        logits = (X Q'^T + b_q)(X K'^T + b_k)^T / sqrt(d)      for each head, Q' = Q + dQ, K' = K + dK
               = frozen + [dQ K + Q dK] + [dQ dK]

    If the strong exponential time hypothesis holds, gradients of LoRA can be approximated in less than quadratic time only
    while such products stay below an order of sqrt(log L). Where a part of adapters is larger than the frozen one, it warns.
    Call it before training and after it.

    Args:
        x: the layer's input, (..., L, width).
        query, key: its projections, linear layers, adapted or not; positions are not turned (rotary ones keep lengths).
        heads: of the queries.
        key_heads: of the keys, where several queries share one; None: as many.

    Raises:
        ValueError: a sequence of less than 2, heads that do not divide the outputs.

    The order is a theorem's, its constant is not known: the numbers compare, and decide nothing. The algorithm that the paper
    shows to exist is not here. Source: "Computational Limits of Low-Rank Adaptation for Transformer-Based Models"
    (arXiv 2406.03136).
    """
    key_heads = key_heads or heads
    length = x.shape[-2] if x.ndim >= 2 else 0
    if length < 2:
        raise ValueError(f"x: {list(x.shape)}; must be (..., length, width) with a length of at least 2")
    q, dq = _parts(x, query, heads, "heads")
    k, dk = _parts(x, key, key_heads, "key_heads")
    if heads % key_heads or k.shape[-1] != q.shape[-1]:
        widths = f"heads of queries are {q.shape[-1]} wide, of keys {k.shape[-1]}"
        raise ValueError(f"heads={heads}, key_heads={key_heads}: {widths}; they must be equal, and key_heads divide heads")
    k, dk = (t.repeat_interleave(heads // key_heads, -3) for t in (k, dk))
    scale = q.shape[-1] ** -0.5
    frozen, linear, quadratic = q @ k.mT, dq @ k.mT + q @ dk.mT, dq @ dk.mT
    sizes = [float((part * scale).abs().max()) for part in (frozen + linear + quadratic, frozen, linear, quadratic)]
    found = Logits(*sizes, bound=math.sqrt(math.log(length)))
    if found.adapter > found.frozen:
        warnings.warn(f"adapters make logits of {found.adapter:.3g}, the base of {found.frozen:.3g}", stacklevel=2)
    return found


def _parts(x: Tensor, layer: nn.Module, heads: int, name: str) -> tuple[Tensor, Tensor]:
    """The layer's outputs by its own weight, and what its adapter adds to them, (..., heads, length, width of a head)."""
    own: Tensor = wide(layer.get_parameter("weight").detach())
    rows = getattr(getattr(layer, "adapter", None), "layout", None)
    moved = wide(folded_weight(layer)) if rows is not None else own
    if rows is not None:
        own, moved = rows.rows.view(own), rows.rows.view(moved)
    if heads < 1 or len(own) % heads:
        raise ValueError(f"{name}={heads}: must divide the {len(own)} outputs of the layer")
    seen = x.detach().to(own.dtype)
    bias = getattr(layer, "bias", None)
    y = seen @ own.mT + (0 if bias is None else bias.detach().to(own.dtype))
    return tuple(t.unflatten(-1, (heads, -1)).transpose(-2, -3) for t in (y, seen @ (moved - own).mT))  # pyright: ignore[reportReturnType]
