"""How many heads attention has, as a module, its config or a `config.json` says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# What they call the number of attention heads, of key and value heads, and the size of one head.
HEADS = ("num_heads", "n_heads", "num_attention_heads", "n_head")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads", "n_query_groups", "num_query_groups")
HEAD_DIM = ("head_dim", "head_size", "attention_head_size", "d_head")


@dataclass(frozen=True)
class Attention:
    """What is said of the heads."""

    heads: int
    kv_heads: int  # fewer than heads where queries share keys and values
    head_dim: int | None


def heads_said(says: object) -> Attention | None:
    """The heads by the attributes of an object or the entries of a mapping; None where neither says how many there are."""
    heads = number(says, HEADS)
    return None if heads is None else Attention(heads, number(says, KV_HEADS) or heads, number(says, HEAD_DIM))


def number(says: object, names: tuple[str, ...]) -> int | None:
    """The first of `names` that is a positive int there: a list of numbers, one per stage, says nothing here."""
    for name in names:
        value: Any = says.get(name) if isinstance(says, Mapping) else getattr(says, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
