"""Which outputs of a fused projection belong to which of its parts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .heads import Attention


@dataclass(frozen=True)
class Part:
    """One of the projections that are stored as one.

    Attributes:
        role: what it would be alone: `attention.q`, `mlp.gate`, ...
        ranges: its places in the dimension of the outputs, in its own order.
    """

    role: str
    ranges: tuple[range, ...]

    @property
    def size(self) -> int:
        return sum(map(len, self.ranges))

    @property
    def index(self) -> torch.Tensor:
        """The places as an index, for `index_select` along the dimension of the outputs."""
        return torch.tensor([place for some in self.ranges for place in some], dtype=torch.int64)


def parts(
    role: str,
    label: str,
    outputs: int,
    heads: Attention | None,
    config: Mapping[str, Any],
    *,
    width: int | None,
    alternate: bool,
) -> tuple[Part, ...]:
    """The parts of a projection with `outputs` outputs; none if it is not fused, or the numbers do not agree.

    Three orders are in use.
    - One below the other: queries, keys, values (`c_attn`, `qkv_proj`, `Wqkv`), or gates and what they gate (`gate_up_proj`).
    - Group by group, `query_key_value`, from Megatron: queries that share a key, the key, the value. How many groups there are
      follows from the number of outputs: as many as heads in GPT-NeoX and BLOOM, one in the first Falcon, in between later.
    - In turns: gate, up, gate, up (the experts of gpt-oss).

    A few models keep an order that neither name nor numbers tell, as InternLM2's `wqkv` and CodeGen's `qkv_proj` do. Where
    `config.json` says that the model comes with code of its own, nothing is claimed.

    Args:
        width: of the model.
        alternate: gates and what they gate come in turns.
    """
    if "auto_map" in config:
        return ()
    kind, _, part = role.rpartition(".")
    if part == "gate_up" and outputs % 2 == 0:
        half = outputs // 2
        if alternate:
            return (Part(f"{kind}.gate", (range(0, outputs, 2),)), Part(f"{kind}.up", (range(1, outputs, 2),)))
        return (Part(f"{kind}.gate", (range(half),)), Part(f"{kind}.up", (range(half, outputs),)))
    if role == "attention.qkv":
        return qkv(label, outputs, heads, config, width)
    if role == "attention.kv" and outputs % 2 == 0 and label.lower() in ("kv_proj", "key_value", "to_kv"):
        half = outputs // 2
        return (Part("attention.k", (range(half),)), Part("attention.v", (range(half, outputs),)))
    return ()


def qkv(label: str, outputs: int, heads: Attention | None, config: Mapping[str, Any], width: int | None) -> tuple[Part, ...]:
    size = None if heads is None else heads.head_dim or (width // heads.heads if width is not None else None)
    if heads is None or size is None:
        grouped = re.fullmatch("query_key_value", label, re.IGNORECASE) is not None
        third = outputs // 3
        return below(third, third) if not grouped and outputs % 3 == 0 and width in (None, third) else ()
    shared, rest = divmod(outputs - heads.heads * size, 2 * size)  # groups of queries that share a key
    if rest or shared < 1 or heads.heads % shared:
        return ()
    # ChatGLM gives Megatron's name to what lies one below the other, and GPT-BigCode the other way round.
    megatron = re.fullmatch("query_key_value", label, re.IGNORECASE) and "multi_query_group_num" not in config
    if megatron or (label == "c_attn" and config.get("multi_query") is False):
        return by_group(shared, heads.heads // shared, size)
    return below(heads.heads * size, shared * size)


def below(queries: int, keys: int) -> tuple[Part, ...]:
    """Queries, keys and values one below the other."""
    ends = (queries, queries + keys, queries + 2 * keys)
    return (
        Part("attention.q", (range(ends[0]),)),
        Part("attention.k", (range(ends[0], ends[1]),)),
        Part("attention.v", (range(ends[1], ends[2]),)),
    )


def by_group(groups: int, queries: int, size: int) -> tuple[Part, ...]:
    """In each group `queries` heads of queries, a key and a value, each of `size` channels."""
    step = (queries + 2) * size
    starts = [group * step for group in range(groups)]
    return (
        Part("attention.q", tuple(range(at, at + queries * size) for at in starts)),
        Part("attention.k", tuple(range(at + queries * size, at + (queries + 1) * size) for at in starts)),
        Part("attention.v", tuple(range(at + (queries + 1) * size, at + step) for at in starts)),
    )
