"""Which operations of a traced graph are one: products that go into the sum that alone uses them.

torch adds a multiple (`add` with alpha), a product (`addcmul`) or a quotient (`addcdiv`) in one pass over memory.
`gather_numbers` brings a graph into the form where that applies most often, `Sums` finds the sums and what they take in.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

ADD, SUB, MUL, DIV = (getattr(torch.ops.aten, name).Tensor for name in ("add", "sub", "mul", "div"))


Form = Literal["", "addcmul", "addcdiv"]  # "": add with alpha


@dataclass(frozen=True)
class Folded:
    """A sum that takes in a product: base + sign * number * x, or with x * y or x / y in place of x."""

    base: fx.Node
    sign: Literal[1, -1]
    number: Any  # a scalar node, a number, or None
    form: Form
    factors: tuple[fx.Node, ...]


class Sums:
    """The sums that take something in (`folded`), and the products that thereby need no operation of their own (`absorbed`)."""

    def __init__(self, nodes: Sequence[fx.Node], outputs: Sequence[fx.Node], scalar: set[fx.Node]) -> None:
        self.scalar = scalar
        self.folded: dict[fx.Node, Folded] = {}
        self.absorbed: set[fx.Node] = set(outputs)  # no result is folded away; the rest joins below
        for node in reversed(nodes):  # the outermost sum takes in first
            self._fold(node)
        self.absorbed -= set(outputs)

    def _fold(self, node: fx.Node) -> None:
        """Let a sum of two tensors take in a product that goes nowhere else."""
        if node.target not in (ADD, SUB) or node.kwargs or node in self.scalar or not all(map(self._is_tensor, node.args)):
            return
        first, second = node.args
        sign: Literal[1, -1] = -1 if node.target is SUB else 1
        for product, base in ((second, first), (first, second))[: 1 if sign == -1 else 2]:
            assert isinstance(product, fx.Node) and isinstance(base, fx.Node)
            if product is not base and self._single(product):
                taken = self._product(product)
                if taken is not None:
                    self.folded[node] = Folded(base, sign, *taken)
                    return

    def _product(self, node: fx.Node) -> tuple[Any, Form, tuple[fx.Node, ...]] | None:
        """number, form and factors of a product, which is then absorbed."""
        if node.target is MUL and not all(map(self._is_tensor, node.args)):
            x, number = node.args if self._is_tensor(node.args[0]) else reversed(node.args)
            self.absorbed.add(node)
            assert isinstance(x, fx.Node)
            inner = self._product(x) if self._single(x) and all(map(self._is_tensor, x.args)) else None
            return (number, *inner[1:]) if inner is not None else (number, "", (x,))
        if node.target in (MUL, DIV) and all(map(self._is_tensor, node.args)):
            self.absorbed.add(node)
            form: Form = "addcmul" if node.target is MUL else "addcdiv"
            return None, form, tuple(arg for arg in node.args if isinstance(arg, fx.Node))
        return None

    def _is_tensor(self, arg: Any) -> bool:
        return isinstance(arg, fx.Node) and arg not in self.scalar

    def _single(self, node: fx.Node) -> bool:
        """Whether a value is used once, and may disappear."""
        uses = sum(user.all_input_nodes.count(node) for user in node.users)
        return uses == 1 and node.target in (MUL, DIV) and not node.kwargs and node not in self.absorbed


def scalars(nodes: Sequence[fx.Node], inputs: int) -> set[fx.Node]:
    """Nodes that are numbers: entries of the row, which is the first placeholder after the inputs, and sums of numbers."""
    found: set[fx.Node] = set()
    placeholders = [node for node in nodes if node.op == "placeholder"]
    rows = {placeholders[inputs]} if len(placeholders) > inputs else set()
    for node in nodes:
        arguments = [arg for arg in node.args if isinstance(arg, fx.Node)]
        if node.target is torch.ops.aten.unbind.int and arguments[0] in rows:
            rows.add(node)
        elif (node.target is operator.getitem and arguments[0] in rows) or (
            node.op == "call_function" and arguments and all(arg in found for arg in arguments)
        ):
            found.add(node)
    return found


def gather_numbers(graph: fx.Graph, inputs: int) -> None:
    """Move numbers outwards, where a sum can take them in; the order of products of tensors and numbers is all that changes.

    (a x) / y -> a (x / y);    b (a x) -> (a b) x;    p - a x -> (-a) x + p, for a product p that is more than a number's
    """
    known = scalars(list(graph.nodes), inputs)

    def split(arg: Any) -> tuple[fx.Node, Any] | None:
        """The tensor and the number of a product of the two."""
        if not isinstance(arg, fx.Node) or arg.target is not MUL or arg.kwargs or arg in known:
            return None
        for x, number in (arg.args, arg.args[::-1]):
            if isinstance(x, fx.Node) and x not in known and (number in known or isinstance(number, (int, float))):
                return x, number
        return None

    def lone(arg: Any) -> tuple[fx.Node, Any] | None:
        return split(arg) if isinstance(arg, fx.Node) and len(arg.users) == 1 else None

    def more(arg: Any) -> bool:
        found = lone(arg)
        return found is not None and found[0].target in (MUL, DIV) and split(found[0]) is None

    def times(a: Any, b: Any) -> Any:
        return call(MUL, a, b) if isinstance(a, fx.Node) or isinstance(b, fx.Node) else a * b

    def call(target: Any, *args: Any) -> fx.Node:
        made = graph.call_function(target, args)
        if all(arg in known or not isinstance(arg, fx.Node) for arg in args):
            known.add(made)
        return made

    for node in list(graph.nodes):
        if node.target not in (MUL, DIV, SUB) or node.kwargs or node in known:
            continue
        made = None
        with graph.inserting_before(node):
            if node.target is DIV and (inner := lone(node.args[0])) is not None and node.args[1] not in known:
                made = call(MUL, call(DIV, inner[0], node.args[1]), inner[1])
            elif (outer := split(node)) is not None and (inner := lone(outer[0])) is not None:
                made = call(MUL, inner[0], times(inner[1], outer[1]))
            elif node.target is SUB and (taken := lone(node.args[1])) is not None and more(node.args[0]):
                made = call(ADD, call(MUL, taken[0], times(taken[1], -1.0)), node.args[0])
        if made is not None:
            node.replace_all_uses_with(made)
    graph.eliminate_dead_code()
