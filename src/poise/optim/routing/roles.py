"""What a parameter is: by the type of the module that owns it and that module's surroundings, else by name and shape.

There is no list of architectures here. Where a guess is needed it errs towards the roles that matrix rules leave alone
(embedding, head, vector): an embedding under Muon does harm, a hidden matrix under AdamW only misses a gain.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import ParametrizationList

from poise.checkpoint.structure.heads import Attention
from poise.checkpoint.structure.words import DOWN, EMBEDDING, EXPERT, FUSED, HEAD, is_bias

from .tree import Node, attention, clean, in_block, walk

ROLES = ("matrix", "conv", "experts", "embedding", "head", "norm", "bias", "vector", "scalar")

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase)
# Names that say "output" only of the very last layer.
_LAST = re.compile(r"fc_?\d*|output(_\w+)?|out|score|decoder|final(_\w+)?|last(_\w+)?|predictions?", re.IGNORECASE)
_LOGARITHM = re.compile(r"(^|_)log(_|$)", re.IGNORECASE)


class Found(NamedTuple):
    """What was found out about one parameter at one place."""

    role: str
    heads: int | None = None
    splits: tuple[int, ...] = ()
    inputs_first: bool = False


def from_module(model: nn.Module, at_ends: Mapping[nn.Module, str]) -> Iterator[tuple[str, Tensor, Found]]:
    """Every parameter at every place, as (torch's name, tensor, what it is); `at_ends` comes from `ends`."""
    for node in walk(model):
        owner, attribute = _parametrized(node)
        for own, tensor in node.module._parameters.items():
            if tensor is None:
                continue
            path = f"{node.path}.{own}" if node.path else own
            if torch.nn.parameter.is_lazy(tensor):
                yield path, tensor, Found("matrix")  # without a shape there is no role: collect() refuses it
            elif attribute is None:
                yield path, tensor, _found(node, own, tensor.shape, at_ends)
            elif sum(size > 1 for size in tensor.shape) > 1:
                yield path, tensor, _found(owner, attribute, tensor.shape, at_ends)
            else:  # a part of a weight without two dimensions of its own: the magnitude that weight_norm takes apart
                yield path, tensor, Found("vector" if tensor.ndim else "scalar")


def from_name(name: str, shape: torch.Size) -> Found:
    """What a parameter is when there is no module to ask: by its name (empty: unnamed) and shape alone."""
    *path, own = name.split(".")
    named = [part for part in path if not part.isdigit()]
    part = named[-1] if named else own
    label = part if own == "weight" else own
    # In `layers.3.attention.output.weight` the number stands before the last named part: a block that the model repeats.
    repeated = bool(named) and any(p.isdigit() for p in path[: len(path) - path[::-1].index(part)])
    if len(shape) == 2 and not is_bias(own) and not repeated and (HEAD.fullmatch(label) or label.lower() == "output"):
        return Found("head")
    role = _by_shape(name, own, shape, stacked=False)
    return Found(role, splits=_splits(label, shape, None) if role == "matrix" else ())


def ends(models: Sequence[nn.Module]) -> dict[nn.Module, str]:
    """The layers at either end of the models, with their roles: "embedding" for those that read the data, else "head".

    Beside nn.Embedding, the first convolution registered reads the data if it stands outside the repeated blocks and its input
    is as wide as no layer's output: three colours, one for each microphone.
    """
    found = dict.fromkeys(output_heads(models), "head")
    for model in models:
        nodes = list(walk(model))
        first = next((node for node in nodes if isinstance(node.module, _ConvNd)), None)
        if first is not None and not in_block(first):
            made = {width for node in nodes for width in _makes(node.module)}
            if first.module.in_channels not in made:
                found[first.module] = "embedding"
    return found


def output_heads(models: Sequence[nn.Module]) -> set[nn.Module]:
    """The layers whose output leaves the model: they turn features into logits.

    A linear layer outside the repeated blocks is one if
    - its name says so: `lm_head`, `classifier`, ...; or
    - it has one output for each row of an nn.Embedding. Such a match may be chance, because position tables have rows too and
      a table of 1024 positions in a model of width 1024 would make every layer a head. A width is read again by some layer,
      logits are not: a number that is the input width of any layer, norm or embedding is therefore no vocabulary; or
    - it is the last one registered, and has a name that would not suffice elsewhere: `fc`, `fc3`, `output`, `classifier.6`.
    """
    nodes = [node for model in models for node in walk(model)]
    linears = [node for node in nodes if _is_linear(node.module)]
    widths = {width for node in nodes for width in _reads(node.module)}
    rows = (node.module.num_embeddings for node in nodes if _is_embedding(node.module))
    vocabularies = {number for number in rows if isinstance(number, int)} - widths
    found: set[nn.Module] = set()
    for node in linears:
        if in_block(node):
            continue
        last = node is linears[-1] and (HEAD.fullmatch(node.holder.name) or _LAST.fullmatch(node.holder.name))
        if last or HEAD.fullmatch(node.name) or node.module.out_features in vocabularies:
            found.add(node.module)
    return found


def _found(node: Node, own: str, shape: torch.Size, at_ends: Mapping[nn.Module, str]) -> Found:
    """What the parameter `own` of the module at `node` is."""
    role = _role(node, own, shape, at_ends)
    turned = _inputs_first(node.module, own, shape, role)
    if role not in ("matrix", "bias") or at_ends.get(node.module) == "head":
        return Found(role, inputs_first=turned)
    belongs = attention(node)
    label = node.name if own == "weight" else own
    shape = shape[::-1] if turned else shape
    splits = _splits(label, shape, belongs) if role == "matrix" else ()
    return Found(role, _heads_of(shape, belongs), splits, turned)


def _inputs_first(module: nn.Module, own: str, shape: torch.Size, role: str) -> bool:
    """Whether a weight is stored (in, out, ...) instead of (out, in, ...).

    Of stacked experts the width that the module itself names decides: what is made from it has it as its inputs.
    """
    if role == "conv":
        return isinstance(module, _ConvTransposeNd)
    if role in ("matrix", "head") and len(shape) == 2:  # Conv1D of transformers: y = x W + b
        return getattr(module, "nf", None) == shape[1] and not _is_linear(module)
    if role != "experts" or len(shape) != 3:
        return False
    width = next((w for name in ("hidden_size", "hidden_dim") if isinstance(w := getattr(module, name, None), int)), None)
    if width is None or shape[1] == shape[2]:
        return bool(getattr(module, "is_transposed", False))
    return (shape[2] if DOWN.search(own) else shape[1]) == width


def _role(node: Node, own: str, shape: torch.Size, at_ends: Mapping[nn.Module, str]) -> str:
    module = node.module
    if isinstance(module, _NORMS) or ("norm" in type(module).__name__.lower() and sum(size > 1 for size in shape) < 2):
        return "norm" if shape else "scalar"
    if own == "weight":  # of another rank than the type says only where FSDP1 has flattened it: then its shape decides
        if _is_embedding(module) and len(shape) == 2:
            return "embedding"
        if _is_linear(module) and len(shape) == 2:
            return at_ends.get(module, "matrix")
        if isinstance(module, _ConvNd) and len(shape) > 2:
            return at_ends.get(module, "conv")
    if len(shape) == 2 and HEAD.fullmatch(own) and not in_block(node):  # an output without a layer of its own
        return "head"
    expert = bool(EXPERT.search(clean(f"{node.path}.{own}")) or EXPERT.search(type(module).__name__))
    return _by_shape(f"{node.name}.{own}", own, shape, stacked=True, expert=expert)


def _by_shape(label: str, own: str, shape: torch.Size, *, stacked: bool, expert: bool = False) -> str:
    """The role by name and shape. `stacked`: what has three dimensions and is no convolution is a stack of matrices."""
    wide = sum(size > 1 for size in shape)
    if not shape:
        return "scalar"
    if is_bias(own):
        return "bias"
    if len(shape) == 1 or (wide < 2 and (stacked or len(shape) > 2)):  # class tokens (1, 1, width), gains (channels, 1, 1)
        return "vector"
    if _LOGARITHM.search(own):  # `A_log`: one number for each channel and state, whatever its shape, and no linear map
        return "vector"
    if EMBEDDING.search(label if len(shape) == 2 else own):  # `patch_embed.proj.weight` is a convolution, `pos_embed` a table
        return "embedding"
    if len(shape) == 2:
        return "matrix"
    if len(shape) == 3 and (expert or EXPERT.search(label)):
        return "experts"
    if len(shape) == 3 and stacked:  # with a batch dimension of 1 it is a learned input, added or put before a sequence
        return "experts" if shape[0] > 1 else "embedding"
    return "conv"


def _splits(label: str, shape: torch.Size, belongs: Attention | None) -> tuple[int, ...]:
    """Rows of query, key and value where one matrix holds all three, by its name and only if the numbers agree."""
    if not FUSED.search(label):
        return ()
    rows, columns = shape
    if belongs is not None:
        size = belongs.head_dim or columns // belongs.heads
        query, key = belongs.heads * size, belongs.kv_heads * size
        if query + 2 * key == rows:
            return (query, key, key)
    return (columns,) * 3 if rows == 3 * columns else ()


def _heads_of(shape: torch.Size, belongs: Attention | None) -> int | None:
    """The heads of one projection: keys and values have fewer where several queries share them.

    None where no dimension of it is a number of heads, as in a low-rank projection before them.
    """
    if belongs is None or all(size % belongs.heads and size % belongs.kv_heads for size in shape):
        return None
    size = belongs.head_dim or (shape[1] // belongs.heads if len(shape) == 2 else None)
    return belongs.kv_heads if size is not None and shape[0] == belongs.kv_heads * size else belongs.heads


def _parametrized(node: Node) -> tuple[Node, str | None]:
    """For the list that parametrize puts at `layer.parametrizations.weight`: the layer and "weight"; else the node and None."""
    if isinstance(node.module, ParametrizationList) and node.parent is not None and node.parent.parent is not None:
        return node.parent.parent, node.name
    return node, None


def _is_linear(module: nn.Module) -> bool:
    """nn.Linear, or any layer that describes itself as one does (a module with the same attributes and a weight)."""
    return isinstance(module, nn.Linear) or (hasattr(module, "in_features") and hasattr(module, "out_features"))


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) or (
        hasattr(module, "num_embeddings") and hasattr(module, "embedding_dim")
    )


def _makes(module: nn.Module) -> Iterator[int]:
    """The widths of what a layer hands on."""
    for name in ("out_features", "out_channels", "embedding_dim"):
        width = getattr(module, name, None)
        if isinstance(width, int):
            yield width


def _reads(module: nn.Module) -> Iterator[int]:
    """The widths that a layer takes its input in (an embedding: those it hands on)."""
    for name in ("in_features", "in_channels", "embedding_dim", "num_features", "num_channels"):
        width = getattr(module, name, None)
        if isinstance(width, int):
            yield width
    shape = getattr(module, "normalized_shape", ())
    yield from shape[-1:]
