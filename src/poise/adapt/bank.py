"""Small square matrices that all layers of a model share, and how each token asks for a mixture of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .earlier import Earlier
from .routing import route

Pool = Literal["causal", "sequence", "none"]


class Bank(nn.Module):
    """Atoms, and what is needed to ask for them; one for all layers.

    Args:
        atoms: (M, r, r).
        keys: (M, q), of the atoms.
        ask: (q, 2 r), from a state and a summary of earlier ones to a query.
        depth: (blocks - 2, r), with which the blocks that have several before them attend to these.
        top_k, pool, gamma: see `poise.adapt.QueryableLoRA`.

    Attributes:
        prior: over atoms, (M,) or one for each sequence (batch, M), from an instruction; None: there is none.
    """

    def __init__(self, atoms: Tensor, keys: Tensor, ask: Tensor, depth: Tensor, top_k: int, pool: Pool, gamma: float) -> None:
        super().__init__()
        self.atoms, self.keys, self.ask = nn.Parameter(atoms), nn.Parameter(keys), nn.Parameter(ask)
        self.depth = nn.Parameter(depth) if len(depth) else None
        self.top_k, self.pool, self.gamma = top_k, pool, gamma
        self.prior: Tensor | None = None
        self.earlier = Earlier()

    def begin(self, *_: Any) -> None:
        """A forward pass begins: a hook of the model."""
        self.earlier.begin()

    def pooled(self, h: Tensor, ordered: bool) -> Tensor:
        """States of tokens (..., tokens, r): of each, or of several where they are `ordered`, as tokens of a sequence are."""
        if not ordered or self.pool == "none":
            return h
        if self.pool == "sequence":
            return h.mean(-2, keepdim=True)
        seen = torch.arange(1, h.shape[-2] + 1, device=h.device, dtype=h.dtype)
        return h.cumsum(-2) / seen[:, None]

    def summary(self, others: Sequence[Tensor], block: int, like: Tensor) -> Tensor:
        """z: of states that earlier blocks told."""
        if not others:
            return torch.zeros_like(like)
        odd = next((other for other in others if other.shape != like.shape), None)
        if odd is not None:
            raise ValueError(
                f"pool={self.pool!r}: tokens of block {block} are shaped {tuple(like.shape[:-1])}, those of an earlier one "
                f"{tuple(odd.shape[:-1])}; attach with pool='sequence', or with blocks=1 so that none hears of another"
            )
        told = torch.stack(list(others), -2)
        if len(others) == 1 or self.depth is None:
            return told.mean(-2)
        share = (told @ self.depth[block - 2] / math.sqrt(told.shape[-1])).softmax(-1)
        return (share[..., None, :] @ told).squeeze(-2)

    def shares(self, state: Tensor, summary: Tensor) -> Tensor:
        """alpha, (..., M): of each atom, of which all but the top k are zero."""
        query = F.linear(torch.cat([state, summary], -1), self.ask)
        logits = F.linear(query, self.keys) / math.sqrt(self.keys.shape[1])
        if self.prior is not None and self.gamma:
            prior = self.prior.to(logits)
            if prior.ndim == 2:
                prior = prior.reshape(len(prior), *[1] * (logits.ndim - 2), -1)
            logits = logits + self.gamma * prior.log()
        return route(logits, self.top_k).weights

    def core(self, shares: Tensor) -> Tensor:
        """R = sum_j alpha_j U_j, (..., r, r)."""
        return torch.einsum("...m,mij->...ij", shares, self.atoms)

    def mixed(self, h: Tensor, shares: Tensor) -> Tensor:
        """R h, without R."""
        count, rank = self.atoms.shape[:2]
        each = F.linear(h, self.atoms.reshape(count * rank, rank)).unflatten(-1, (count, rank))
        return (shares.unsqueeze(-2) @ each).squeeze(-2)
