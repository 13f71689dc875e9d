"""A model as a tree: every module with its place, wrappers undone, and what its surroundings say of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from poise.checkpoint.structure.heads import Attention, heads_said
from poise.checkpoint.structure.words import ATTENTION

# The attribute under which a wrapper keeps the module that it wraps: DistributedDataParallel (and DataParallel, AveragedModel),
# torch.compile, FSDP1, activation checkpointing. The wrapped module takes the wrapper's place in names and in the tree.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@dataclass(frozen=True, eq=False)
class Node:
    """One module at one place of the model."""

    module: nn.Module
    path: str  # as torch names it, wrappers included
    name: str  # the attribute that its parent holds it under; of a wrapped module: the wrapper's; "" for the root
    parent: Node | None

    def ancestors(self) -> Iterator[Node]:
        """The modules around this one, the nearest first."""
        node = self.parent
        while node is not None:
            yield node
            node = node.parent

    @property
    def holder(self) -> Node:
        """The nearest module from here upwards that has a name and not a number: `classifier` for `classifier.6`."""
        node = self
        while node.name.isdigit() and node.parent is not None:
            node = node.parent
        return node


def walk(root: nn.Module) -> Iterator[Node]:
    """Every place of a module in registration order; a module used at two places comes twice."""

    def visit(node: Node) -> Iterator[Node]:
        yield node
        for name, child in node.module._modules.items():
            if child is None:
                continue
            path = f"{node.path}.{name}" if node.path else name
            if name in WRAPPERS:
                yield from visit(Node(child, path, node.name, node.parent))
            else:
                yield from visit(Node(child, path, name, node))

    return visit(Node(root, "", "", None))


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside all its wrappers."""
    inside = next((child for name in WRAPPERS if (child := module._modules.get(name)) is not None), None)
    return module if inside is None else unwrap(inside)


def clean(name: str) -> str:
    """`name` without the parts that wrappers add. The last part, the parameter's own name, always stays."""
    *path, own = name.split(".")
    return ".".join([*(part for part in path if part not in WRAPPERS), own])


def clean_all(names: Iterable[str]) -> list[str]:
    """`clean` for the names of one group, except where two would become one: a model may own a submodule called `module`."""
    names = list(names)
    owners: dict[str, set[str]] = {}
    for name in names:
        owners.setdefault(clean(name), set()).add(name)
    return [clean(name) if len(owners[clean(name)]) == 1 else name for name in names]


def is_block(node: Node) -> bool:
    """Whether a module is a block that the model repeats: it stands in a ModuleList, or beside a module of its own class.

    Sequential and its kin are mere containers: `features` and `classifier` of a convolution network are both Sequential
    without being alike.
    """
    if node.parent is None or isinstance(node.module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return False
    if isinstance(node.parent.module, nn.ModuleList):
        return True
    own = type_before_parametrizations(node.module)  # parametrize gives every module a class of its own
    return sum(type_before_parametrizations(unwrap(child)) is own for child in node.parent.module.children()) > 1


def block_of(node: Node) -> Node | None:
    """The nearest repeated block around a module."""
    return next((place for place in node.ancestors() if is_block(place)), None)


def in_block(node: Node) -> bool:
    """Whether a module lies inside a block that the model repeats, so that it can be neither its first nor its last layer."""
    return block_of(node) is not None


def attention(node: Node) -> Attention | None:
    """The heads of the attention module that a layer or parameter holder belongs to.

    Attention is what is called so, by class or by attribute; it may leave the numbers to its `config`. Any other module is
    believed for its direct children only, and never for its config: a whole model carries one too, and its MLPs have no heads.
    """
    for place in (node, *node.ancestors()):
        if ATTENTION.search(type(place.module).__name__) or ATTENTION.search(place.name):
            found = heads_said(place.module) or heads_said(getattr(place.module, "config", None))
        elif place is node or place is node.parent:
            found = heads_said(place.module)
        else:
            continue
        if found is not None:
            return found
    return None
