"""A whole checkpoint described, from names, shapes and `config.json`; no tensor is read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..checkpoint import Checkpoint
from .fused import Part, parts
from .heads import Attention
from .layers import Where, expert_of, layers
from .roles import named, role_of
from .ties import Tied, tied
from .whole import attention, blocks, model_width, modules, orientations, tokens


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
    width = model_width(config, shapes, roles, vocabulary)
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
