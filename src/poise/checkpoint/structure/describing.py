"""A whole checkpoint described, from names, shapes and `config.json`; no tensor is read."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..checkpoint import Checkpoint
from .fused import Part, parts
from .heads import Attention, heads_said, number
from .layers import Where, expert_of, layers
from .orientation import Matrix, inputs_first
from .roles import named, role_of
from .ties import Tied, tied

WIDTH = ("hidden_size", "n_embd", "d_model", "dim")
TOKENS = ("embed_tokens", "wte", "word_embeddings", "token_embedding", "tok_embeddings", "embed_in", "shared", "token_embd")


@dataclass(frozen=True)
class Described:
    """What one tensor is.

    Attributes:
        role: one of `ROLES`.
        layer: number of the layer; None outside of layers.
        stack: path of the layer's stack, see `layers`; None outside.
        of: of a bias, the role of the weight beside it.
        expert: number of a numbered expert.
        experts: how many a stack holds in its first dimension; None for what is no stack.
        inputs_first: the last two dimensions are (in, out), as in GPT-2's Conv1D, and not (out, in).
        outputs: the dimension of the outputs; None for what is no map and no bias of one.
        parts: of a fused projection, places in the dimension `outputs`.
        vocabulary: the dimension whose places are tokens.
    """

    role: str
    layer: int | None = None
    stack: str | None = None
    of: str | None = None
    expert: int | None = None
    experts: int | None = None
    inputs_first: bool = False
    outputs: int | None = None
    parts: tuple[Part, ...] = ()
    vocabulary: int | None = None


@dataclass(frozen=True)
class Structure:
    """What the tensors of a model are.

    Attributes:
        tensors: by name, in the checkpoint's order.
        stacks: path -> number of layers.
        width: of the model's own channels, None where nothing tells.
        vocabulary: number of rows of the token table, None without one.
        heads: of attention.
        ties: other name -> stored name, as the checkpoint gives them.
        tied: how the output head comes by its weights.
    """

    tensors: Mapping[str, Described]
    stacks: Mapping[str, int]
    width: int | None
    vocabulary: int | None
    heads: Attention | None
    ties: Mapping[str, str]
    tied: Tied

    def __getitem__(self, name: str) -> Described:
        return self.tensors[name]


def describe(checkpoint: Checkpoint) -> Structure:
    """Recognise what each tensor is, with no list of architectures: what is not recognised is a `matrix` or a `vector`."""
    shapes = {name: checkpoint.info(name).shape for name in checkpoint}
    config = checkpoint.config
    places = layers(shapes)
    vocabulary = tokens(shapes, places, config)
    owners, inner = modules(shapes), blocks(places)
    roles = {
        name: role_of(
            name,
            shape,
            checkpoint.info(name).dtype.is_floating_point,
            owners=owners,
            layered=name in inner,
            vocabulary=vocabulary,
        )
        for name, shape in shapes.items()
    }
    width = number(config, WIDTH) or number(config.get("text_config"), WIDTH) or table_width(shapes, roles, vocabulary)
    turned = orientations(shapes, roles, places, width)
    by_owner = {named(name).owner: role for name, role in roles.items() if role not in ("bias", "buffer")}
    described = {}
    for name, shape in shapes.items():
        described[name] = one(name, shape, roles[name], by_owner, places.get(name), turned, vocabulary, width, config)
    tables = [name for name, found in described.items() if found.role == "embedding" and found.vocabulary is not None]
    heads = [name for name, found in described.items() if found.role == "head"]
    depth: dict[str, set[int]] = defaultdict(set)
    for where in places.values():
        depth[where.stack].add(where.layer)
    return Structure(
        described,
        {stack: len(numbers) for stack, numbers in depth.items()},
        width,
        vocabulary,
        attention(config),
        dict(checkpoint.ties),
        tied(tables, heads, shapes, checkpoint.ties, config),
    )


def one(
    name: str,
    shape: torch.Size,
    role: str,
    by_owner: Mapping[str, str],
    where: Where | None,
    turned: Mapping[str, bool],
    vocabulary: int | None,
    width: int | None,
    config: Mapping[str, Any],
) -> Described:
    it = named(name)
    of = None
    if role == "bias":
        of = by_owner.get(it.owner) or by_owner.get(it.owner.rpartition(".")[0])
        if of is None and where is None and shape == (vocabulary,):
            of = "head"  # BERT keeps it apart from the tied weight
    main = of or role
    stacked = shape[0] if main.startswith("expert") and len(shape) == (2 if role == "bias" else 3) else None
    first = turned.get(name, False)
    outputs = None
    if name in turned:
        outputs = len(shape) - (1 if first else 2)
    elif role == "bias" and shape:
        outputs = len(shape) - 1
    elif role == "conv":
        outputs = 0
    split: tuple[Part, ...] = ()
    if outputs is not None:
        alternate = stacked is not None and "swiglu_limit" in config and (first or role == "bias")
        heads = attention(config, it.context)
        split = parts(main, it.label, shape[outputs], heads, config, width=width, alternate=alternate)
    rows = None
    if vocabulary is not None and main in ("embedding", "head") and shape:
        dim = 0 if outputs is None else outputs
        rows = dim if shape[dim] == vocabulary else None
    return Described(
        role,
        None if where is None else where.layer,
        None if where is None else where.stack,
        of,
        expert_of(name),
        stacked,
        first,
        outputs,
        split,
        rows,
    )


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
