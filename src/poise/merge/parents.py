"""The models that are merged: opened, with what their names and shapes say of layers, vocabulary and ties."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poise.checkpoint import Checkpoint, CheckpointError, TensorInfo
from poise.checkpoint.structure.ties import asks

from .protocol import wide
from .recipe import Reference

NUMBERED = re.compile(r"^((?:.*?\.)??)(\d+)\.(.+)$")  # what stands before the first number, the number, what follows
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
WIDTHS = ("hidden_size", "n_embd", "d_model", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
FIRST = re.compile(r"embed|wte|wpe|project_in|patch")  # outside of layers: before the first, and not after the last
HEADS = re.compile(r"embed_out|unembed")
PLACES = re.compile(r"pos|wpe|token_type|segment")
BUFFERS = re.compile(r"rotary_emb\.inv_freq$|\.masked_bias$|position_ids$")  # old versions stored them, new ones compute them


@dataclass(frozen=True)
class Stack:
    """Layers `prefix`0 to `prefix`count - 1."""

    prefix: str
    count: int


class Parent:
    """One model of a recipe.

    Attributes:
        reference: what the recipe calls it.
        checkpoint: its weights.
        names: every name of a tensor, those of tied ones too -> the name it is stored under.
    """

    def __init__(self, reference: Reference, checkpoint: Checkpoint) -> None:
        self.reference, self.checkpoint = reference, checkpoint
        self.names: dict[str, str] = {name: name for name in checkpoint} | dict(checkpoint.ties)

    def __str__(self) -> str:
        return str(self.reference)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """What says something of the language model: of several parts, the text's."""
        inner = self.checkpoint.config.get("text_config")
        return {**self.checkpoint.config, **inner} if isinstance(inner, dict) else self.checkpoint.config

    def info(self, name: str) -> TensorInfo:
        return self.checkpoint.info(self.names[name])

    def shape(self, name: str) -> torch.Size:
        return self.info(name).shape

    def file(self, name: str) -> Path | str:
        return self.info(name).file or self.checkpoint.path or str(self.reference)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows as they are computed with.

        Raises:
            CheckpointError: for a number that is not finite.
        """
        read = wide(self.checkpoint.rows(self.names[name], start, stop))
        # A finite sum has finite terms, and costs no second tensor; an infinite one may be only large.
        if not torch.isfinite(read.sum()) and not bool(torch.isfinite(read).all()):
            kind = "NaN" if bool(read.isnan().any()) else "infinite numbers"
            raise CheckpointError(
                f"{kind} in rows {start} to {stop - 1}",
                cure="this model is broken; leave it out, or take an earlier checkpoint",
                file=self.file(name),
                tensor=name,
            )
        return read

    @cached_property
    def stacks(self) -> dict[str, Stack]:
        """Runs of layers by what stands before their number; numbers count from 0 without a gap."""
        found: dict[str, set[int]] = {}
        for name in self.names:
            if match := NUMBERED.match(name):
                found.setdefault(match[1], set()).add(int(match[2]))
        whole = {prefix: Stack(prefix, len(seen)) for prefix, seen in found.items() if max(seen) == len(seen) - 1}
        said = {self.config[key] for key in LAYERS if isinstance(self.config.get(key), int)}
        return {prefix: stack for prefix, stack in whole.items() if not said or stack.count in said}

    @cached_property
    def stack(self) -> Stack:
        """The one run of layers that slices cut.

        Raises:
            CheckpointError: there is none, or there are several.
        """
        stacks = sorted(self.stacks.values(), key=lambda stack: stack.prefix)
        if len(stacks) > 1:  # experts and heads are numbered too: the outermost run of most tensors is meant
            weight = {s: sum(name.startswith(s.prefix) for name in self.names) for s in stacks}
            most = max(weight.values())
            if sorted(weight.values())[-2] * 4 > most:
                names = ", ".join(f"{s.prefix}* ({s.count})" for s in stacks)
                raise CheckpointError(
                    f"has several runs of layers: {names}", cure="slices need one; use models:", file=str(self)
                )
            return max(stacks, key=lambda s: weight[s])
        if not stacks:
            raise CheckpointError("has no numbered layers", cure="slices need them; use models:", file=str(self))
        return stacks[0]

    def layer(self, name: str) -> tuple[Stack, int, str] | None:
        """The stack that a tensor is in, the number of its layer, and its name there; None outside of layers."""
        match = NUMBERED.match(name)
        stack = self.stacks.get(match[1]) if match else None
        return None if match is None or stack is None else (stack, int(match[2]), match[3])

    @cached_property
    def embedding(self) -> str | None:
        """The name of the token embedding."""
        outside = [n for n in self.names if self.layer(n) is None and len(self.shape(n)) == 2 and not PLACES.search(n)]
        named = [n for n in outside if FIRST.search(n) and not HEADS.search(n) and n == self.names[n]]
        if not named:
            named = [n for n in outside if self.shape(n)[0] == self.config.get("vocab_size")]
        return named[0] if named else None

    @property
    def vocabulary(self) -> int | None:
        """How many tokens the embedding has rows for."""
        return None if self.embedding is None else self.shape(self.embedding)[0]

    def by_token(self, name: str) -> bool:
        """Whether a tensor has one row for each token: the embedding, the head, the head's bias."""
        if self.layer(name) is not None or PLACES.search(name) or self.embedding is None:
            return False
        shape = self.shape(name)
        if len(shape) == 2:
            return shape[0] == self.vocabulary
        return len(shape) == 1 and shape[0] == self.vocabulary != self.shape(self.embedding)[1] and "norm" not in name.lower()

    def tie(self, name: str) -> bool:
        """Take `name`, which other models store and this one does not, for the embedding, if it can be the tied head."""
        if self.embedding is None or not asks(self.checkpoint.config):
            return False
        self.names[name] = self.names[self.embedding]
        return True


def is_before(name: str) -> bool:
    """Whether a tensor outside of layers stands before the first one: embeddings do, the last norm and the head do not."""
    return bool(FIRST.search(name)) and not HEADS.search(name)
