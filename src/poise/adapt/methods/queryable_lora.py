"""Queryable LoRA: a low-rank change whose small core each token asks for, from atoms that all layers share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from poise.catalog import Paper, choice, method

from ..adaptation import Adaptation, Draw, Losses
from ..adapter import Adapter, LowRank
from ..attaching import adapters
from ..bank import Bank, Pool
from ..layout import Layout
from ..targets import Place
from .lora import check, start

Shared = tuple[Bank, dict[str, int], list[int]]  # and by path the number of each layer, by number its block


class Queryable(LowRank):
    """A low-rank product with a core between its factors that each token asks the bank for.

    Args:
        layout, down, up, scale, dropout: as of LowRank.
        bank: of all layers.
        number, block: of the layer and of its block, from 0 on.
        opens: whether it is the first of its block, whose states later blocks hear.
    """

    def __init__(
        self,
        layout: Layout,
        down: Tensor,
        up: Tensor,
        scale: float,
        dropout: float,
        bank: Bank,
        number: int,
        block: int,
        opens: bool,
    ) -> None:
        super().__init__(layout, down, up, scale, dropout)
        self.bank, self.number, self.block, self.opens = bank, number, block, opens
        self.foldable = len(bank.atoms) == 1  # which every token asks for

    def between(self, h: Tensor) -> Tensor:
        if self.layout.kind != "conv":
            return self._asked(h, h.ndim > 2)
        h = h.movedim(self.layout.axis, -1)
        places = h.shape[-1 - len(self.layout.kernel) : -1]
        flat = h.flatten(-1 - len(places), -2)
        return self._asked(flat, True).unflatten(-2, places).movedim(-1, self.layout.axis)

    def _asked(self, h: Tensor, ordered: bool) -> Tensor:
        bank = self.bank
        state = bank.pooled(h, ordered)
        others = bank.earlier.visit(self.number, self.block, self.opens, state)
        return bank.mixed(h, bank.shares(state, bank.summary(others, self.block, state)))

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Of a bank with one atom."""
        return self.lora_A, self.lora_B @ self.bank.atoms[0], self.scale


@method(
    "queryable-lora",
    family="adapt",
    kind="adapter",
    paper=Paper("Instruction-Regularized Routing Over Shared Low-Rank Update Atoms", arxiv="2605.08423", year=2026),
    tune={"alpha": choice(8.0, 16.0, 32.0), "top_k": choice(1, 2, 4)},
    mutant=("self._asked(h, h.ndim > 2)", "self._asked(h, False)"),
    exempt={
        "folds": "Which atoms are mixed depends on the input, so no single weight does the same, unless there is one atom."
    },
)
@dataclass(frozen=True)
class QueryableLoRA(Adaptation):
    """Experimental: LoRA with a core between its factors, mixed for each token from atoms that all layers share.

        h = A x,   R = sum_j alpha_j U_j,   y = W x + s B R h,    s = alpha / rank
        q = W_q [pool(h); z],    e_j = q . c_j / sqrt(query) + gamma log pi_j,    alpha = softmax of the top k of e
        z = sum_b a_b pool(h)_b,    a = softmax(u . pool(h)_b / sqrt(rank)) over earlier blocks b; 0 for the first

    Atoms U_1 .. U_M (rank, rank), their keys c, W_q and the u of each block are one bank for the whole model; A and B are each
    layer's own. Layers are grouped, in the model's order, into blocks of about equally many. Since alpha is convex, |R| is at
    most that of the largest atom. pi is a prior over atoms that an instruction gives: see `instruct`.

    At first U_j = I + N(0, 0.01^2), c_j ~ N(0, 1), W_q ~ N(0, 1 / (2 rank)), u = 0; A and B as of LoRA, so B = 0. With one
    atom, the identity, this is LoRA.

    Args:
        rank, alpha, dropout: as of LoRA.
        atoms, top_k: M = 8, of which 2 are mixed for a token.
        blocks: 4, or as many as there are layers. 1: layers hear nothing of each other, and z = 0.
        query: the length of queries and keys; None: as the rank.
        pool: "causal" (default): the mean over tokens up to each, never of later ones. "sequence": the mean over all, for
            models that see all. "none": each token's own.
        gamma: 1, the weight of the prior; without one it has no effect.

    Raises:
        ValueError: settings out of range; in a forward pass, blocks whose tokens have no common places, as an encoder's and a
            decoder's with pool="causal".
        RuntimeError: in a backward pass: activation checkpointing that would lose gradients or mix passes up.

    Tokens are along the last dimension but one of an input of three or more; rows of a matrix are tokens without order, and the
    positions of a convolution are in their order in memory. Padding counts as tokens: pad on the right. Generating with a
    cache of keys and values shows each layer only the new tokens, so that with pool="causal" states differ from those of a
    whole pass; generate without it, or with pool="none". A module that is used twice in a pass is heard as it was last.
    Checkpointing must be torch's with use_reentrant=False, with a backward pass after each forward pass.

    Reconstructed: a summary of the paper gives the shared bank, blocks of consecutive layers, the query from a low-rank state
    and attention over earlier blocks, the prior added to the logits, softmax over the top k, and the bound. Chosen here,
    because no equation could be found: each layer asks with its own state, and its block tells that of its first layer; mean
    pooling; one W_q; a learned u for each block, as its only query over depth; all sizes and beginnings. Source:
    "Instruction-Regularized Routing Over Shared Low-Rank Update Atoms" (arXiv 2605.08423).
    """

    rank: int = 8
    alpha: float | None = 8.0
    dropout: float = 0.0
    atoms: int = 8
    top_k: int = 2
    blocks: int = 4
    query: int | None = None
    pool: Pool = "causal"
    gamma: float = 1.0

    def __post_init__(self) -> None:
        check(self.rank, self.alpha, self.dropout)
        for name in ("atoms", "blocks", "query"):
            value = getattr(self, name)
            if (name, value) != ("query", None) and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value}: must be a whole number of at least 1")
        if not isinstance(self.top_k, int) or not 1 <= self.top_k <= self.atoms:
            raise ValueError(f"top_k={self.top_k}: must be a whole number from 1 to atoms={self.atoms}")
        if self.pool not in ("causal", "sequence", "none"):
            raise ValueError(f"pool={self.pool!r}: must be 'causal', 'sequence' or 'none'")
        if not 0 <= self.gamma < math.inf:
            raise ValueError(f"gamma={self.gamma}: must be at least 0 and finite")

    @property
    def scale(self) -> float:
        """s."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def begin(self, model: nn.Module, places: Sequence[Place], draw: Draw, losses: Losses) -> Shared:
        rank, query = self.rank, self.query or self.rank
        atoms = draw.normal(self.atoms, rank, rank, std=0.01) + torch.eye(rank, device=draw.device, dtype=draw.dtype)
        keys, ask = draw.normal(self.atoms, query), draw.normal(query, 2 * rank, std=(2 * rank) ** -0.5)
        blocks = min(self.blocks, len(places))
        bank = Bank(atoms, keys, ask, draw.zeros(max(0, blocks - 2), rank), self.top_k, self.pool, self.gamma)
        of = [i * blocks // len(places) for i in range(len(places))]
        return bank, {place.path: i for i, place in enumerate(places)}, of

    def adapter(self, place: Place, draw: Draw, shared: Any) -> Queryable:
        bank, numbers, blocks = shared
        number = numbers[place.path]
        opens = number == 0 or blocks[number] != blocks[number - 1]
        own = start(place, draw, self.rank)
        return Queryable(place.layout, *own, self.scale, self.dropout, bank, number, blocks[number], opens)

    def finish(self, model: nn.Module, adapters: dict[str, Adapter], losses: Losses) -> Iterable[RemovableHandle]:
        return [model.register_forward_pre_hook(next(_banks(adapters.values())).begin)]


def instruct(model: nn.Module, prior: Tensor | None) -> None:
    """Give the model's bank a prior over its atoms, until the next one; None takes it away. Files do not hold it.

    Args:
        prior: (atoms,), or one for each sequence of the batch (batch, atoms): not negative, with sum 1.

    Raises:
        ValueError: another shape, entries that are no probabilities, a model without Queryable LoRA.
    """
    bank = next(_banks(adapters(model).values()), None)
    if bank is None:
        raise ValueError("model: it is not adapted with Queryable LoRA, and has no atoms")
    if prior is not None:
        count = len(bank.atoms)
        if prior.ndim not in (1, 2) or prior.shape[-1] != count:
            raise ValueError(f"prior: shape {tuple(prior.shape)}; must be ({count},) or (batch, {count}), for so many atoms")
        if bool((prior < 0).any()) or not torch.allclose(sums := prior.double().sum(-1), torch.ones_like(sums), atol=1e-3):
            raise ValueError("prior: must be at least 0 everywhere, with sum 1 over the atoms")
        prior = prior.detach()
    bank.prior = prior


def prior_of(instruction: Tensor, descriptors: Tensor, temperature: float = 1.0) -> Tensor:
    """A prior over atoms: the softmax of cosines between an instruction's embedding and a description of each atom.

    Args:
        instruction: (d,) or (batch, d).
        descriptors: (atoms, d), of the same embedding.
        temperature: 1; the cosines are divided by it.

    Raises:
        ValueError: temperature not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0")
    cosines = F.normalize(instruction, dim=-1) @ F.normalize(descriptors, dim=-1).T
    return (cosines / temperature).softmax(-1)


def _banks(beside: Iterable[Adapter]) -> Iterator[Bank]:
    return iter({id(one.bank): one.bank for one in beside if isinstance(one, Queryable)}.values())
