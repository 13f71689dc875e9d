"""What the whole model tells of its tensors: who stands beside whom, how wide it is, how many tokens it knows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from .heads import Attention, heads_said, number
from .layers import Where
from .orientation import Matrix, inputs_first
from .roles import named

WIDTH = ("hidden_size", "n_embd", "d_model", "dim")
TOKENS = ("embed_tokens", "wte", "word_embeddings", "token_embedding", "tok_embeddings", "embed_in", "shared", "token_embd")


def blocks(places: Mapping[str, Where]) -> set[str]:
    """Names that lie in a block with more layers behind it. The last of a plain row of layers, `classifier.6`, does not."""
    last = {where.stack: 0 for where in places.values()}
    for where in places.values():
        last[where.stack] = max(last[where.stack], where.layer)
    return {name for name, where in places.items() if "." in where.inside or where.layer < last[where.stack]}


def modules(names: Mapping[str, Any]) -> set[str]:
    """Paths of all modules, and of buffers, that names tell of."""
    found = set()
    for name in names:
        found.add(named(name).owner)
        while name:
            found.add(name)
            name = name.rpartition(".")[0]
    return found


def tokens(shapes: Mapping[str, torch.Size], places: Mapping[str, Where], config: Mapping[str, Any]) -> int | None:
    """Rows of the token table: what config says, if a tensor has so many, else those of the table that is called so.

    Tables are often padded beyond what config says, or config was left behind when the vocabulary grew.
    """
    said = number(config, ("vocab_size",)) or number(config.get("text_config"), ("vocab_size",))
    outside = {name: shape for name, shape in shapes.items() if name not in places and len(shape) == 2}
    if said is not None and any(shape[0] == said for shape in outside.values()):
        return said
    return next((shape[0] for name, shape in outside.items() if named(name).label.lower() in TOKENS), None)


def table_width(shapes: Mapping[str, torch.Size], roles: Mapping[str, str], vocabulary: int | None) -> int | None:
    """The width of the token table, else the length that most norms have."""
    for name, role in roles.items():
        if role == "embedding" and len(shapes[name]) == 2 and shapes[name][0] == vocabulary:
            return shapes[name][1]
    lengths = Counter(shapes[name][0] for name, role in roles.items() if role == "norm" and len(shapes[name]) == 1)
    return lengths.most_common(1)[0][0] if lengths else None


def orientations(
    shapes: Mapping[str, torch.Size], roles: Mapping[str, str], places: Mapping[str, Where], width: int | None
) -> dict[str, bool]:
    biases = {named(name).owner: shapes[name] for name, role in roles.items() if role == "bias" and shapes[name]}
    matrices = {}
    for name, role in roles.items():
        shape = shapes[name]
        if role in ("embedding", "norm", "bias", "conv", "buffer", "vector") or len(shape) not in (2, 3):
            continue
        it, bias = named(name), biases.get(named(name).owner)
        stack = places[name].stack if name in places else ""
        matrices[name] = Matrix(role, it.label, stack, shape, None if bias is None else bias[-1])
    return inputs_first(matrices, width)


def attention(config: Mapping[str, Any], context: tuple[str, ...] = ()) -> Attention | None:
    """What config says of heads; of a model of several, what it says of the one that a name belongs to."""
    parts = [config.get("vision_config")] if any("vision" in word for word in context) else []
    for says in (*parts, config, config.get("text_config")):
        if isinstance(says, Mapping) and (found := heads_said(says)) is not None:
            size = found.head_dim or number(says, ("d_kv", "kv_channels"))
            return Attention(found.heads, found.kv_heads, size)
    return None


def model_width(
    config: Mapping[str, Any], shapes: Mapping[str, torch.Size], roles: Mapping[str, str], vocabulary: int | None
) -> int | None:
    """The width that config says, else that of the token table, else the length that most norms have."""
    said = number(config, WIDTH) or number(config.get("text_config"), WIDTH)
    return said or table_width(shapes, roles, vocabulary)
