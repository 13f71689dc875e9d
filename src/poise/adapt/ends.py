"""The layers with which attention and feed-forward modules of repeated blocks end, without a list of architectures.

What stands after such a module stands after its last layer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from torch import nn

from poise.checkpoint.structure.words import ATTENTION, EXPERT
from poise.modules import Rows
from poise.optim.routing.tree import Node, block_of, in_block, is_block, walk

CROSS = re.compile(r"cross|enc_?dec|encoder_attn|enc_attn|multihead_attn", re.IGNORECASE)  # attention to another sequence


def module_ends(model: nn.Module) -> tuple[list[str], list[str]]:
    """Paths of the last layers of self-attention, and of feed-forward parts, in every block that the model repeats.

    Attention is what is called so, by class or attribute; the feed-forward part is what other linear layers the block has. The
    end of either is the last of its layers that writes as many features as most layers of the block read or write. Attention
    to another sequence has none here, nor do single experts, whose outputs are mixed before they leave the module.
    """
    linears = _linears(model)
    inside = {id(node): _attention(node) for node in linears}
    around = {id(place.module) for found in inside.values() if found for place in found.ancestors()}
    attention: dict[int, list[Node]] = {}
    forward: dict[int, list[Node]] = {}
    blocks: dict[int, list[Node]] = {}
    for node in linears:
        found = inside[id(node)]
        block = _block(node, around)
        blocks.setdefault(id(block.module), []).append(node)
        if found is None:
            forward.setdefault(id(block.module), []).append(node)
        elif not _is_cross(node, found):
            attention.setdefault(id(found.module), []).append(node)
    ends = [_end(group, _width(group)) for group in attention.values()]
    others = [_end(group, _width(blocks[block])) for block, group in forward.items() if len(blocks[block]) > len(group)]
    return [path for path in ends if path is not None], [path for path in others if path is not None]


def attention_layers(model: nn.Module) -> list[str]:
    """Paths of all linear layers of attention modules in repeated blocks, attention to another sequence included."""
    return [node.path for node in _linears(model) if _attention(node)]


def _linears(model: nn.Module) -> list[Node]:
    """Linear layers inside repeated blocks, each once, single experts left out."""
    found: dict[int, Node] = {}
    for node in walk(model):
        if _shape(node.module) is not None and in_block(node) and not EXPERT.search(node.path):
            found.setdefault(id(node.module), node)
    return list(found.values())


def _shape(layer: nn.Module) -> tuple[int, int] | None:
    """(outputs, inputs) of a linear layer."""
    weight = layer._parameters.get("weight")
    if weight is None or weight.ndim != 2:
        return None
    rows = Rows.of(layer, weight)
    if isinstance(layer, nn.Linear) or rows.groups:
        return rows.outputs, weight.numel() // rows.outputs
    return None


def _attention(node: Node) -> Node | None:
    """The outermost attention module around a layer that lies in a block."""
    around = [a for a in node.ancestors() if ATTENTION.search(type(a.module).__name__) or ATTENTION.search(a.name)]
    return next((place for place in reversed(around) if in_block(place)), None)


def _is_cross(node: Node, attention: Node) -> bool:
    for place in node.ancestors():
        if CROSS.search(place.name) or CROSS.search(type(place.module).__name__):
            return True
        if place is attention or place.module is attention.module:
            return False
    return False


def _block(node: Node, around: set[int]) -> Node:
    """The nearest module around a layer that holds attention, too, if it is a repeated block or in one; else that block."""
    shared = next((place for place in node.ancestors() if id(place.module) in around), None)
    found = shared if shared is not None and (is_block(shared) or in_block(shared)) else block_of(node)
    assert found is not None
    return found


def _width(group: Iterable[Node]) -> int:
    sizes = Counter(size for node in group for size in _shape(node.module) or ())
    return sizes.most_common(1)[0][0]


def _end(group: Iterable[Node], width: int) -> str | None:
    found = None
    for node in group:
        shape = _shape(node.module)
        if shape is not None and shape[0] == width:
            found = node.path
    return found
