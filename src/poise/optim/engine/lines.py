"""A traced graph as lines of Python that write every value into a place that is there already.

Products are folded into the sums they go to (`add` with alpha, `addcmul`, `addcdiv`), and a value goes straight into the result
that it becomes wherever the old one is no longer needed: fewer passes over memory, and fewer tensors to hold in the cache.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

Run = Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Sequence[float], Sequence[Tensor]], None]

BINARY: dict[Any, str] = {
    torch.ops.aten.mul.Tensor: "mul", torch.ops.aten.add.Tensor: "add", torch.ops.aten.sub.Tensor: "sub",
    torch.ops.aten.div.Tensor: "div", torch.ops.aten.maximum.default: "maximum", torch.ops.aten.minimum.default: "minimum",
}  # fmt: skip
UNARY = {
    getattr(torch.ops.aten, name).default: name
    for name in ("sqrt", "sign", "abs", "neg", "reciprocal", "rsqrt", "exp", "square")
}
SYMBOL = {"mul": "*", "add": "+", "sub": "-", "div": "/"}


ADD, SUB, MUL, DIV = (getattr(torch.ops.aten, name).Tensor for name in ("add", "sub", "mul", "div"))


@dataclass(frozen=True)
class Folded:
    """A sum that takes in a product: base + sign * number * x, or with x * y or x / y in place of x."""

    base: fx.Node
    sign: Literal[1, -1]
    number: Any  # a scalar node, a number, or None
    form: Literal["", "addcmul", "addcdiv"]
    factors: tuple[fx.Node, ...]


class Lines:
    """A traced graph as lines of Python over `i` (inputs), `r` (results), `s` (scalars) and `b` (buffers).

    Every value is written into its result where the input of that name is no longer needed, else into a free buffer.
    """

    def __init__(self, inputs: Sequence[str], written: Sequence[str], graph: fx.Graph) -> None:
        self.inputs, self.written = inputs, written
        self.lines: list[str] = []
        self.buffers = 0
        self.free: list[int] = []
        self.text: dict[fx.Node, str] = {}  # how a value is spelled
        self.known = True
        _gather_numbers(graph, len(inputs))
        nodes = list(graph.nodes)
        outputs: list[Any] = list(nodes[-1].args[0])
        self.scalar = _scalars(nodes, len(inputs))
        self.folded: dict[fx.Node, Folded] = {}
        self.absorbed: set[fx.Node] = set(outputs)  # no result is folded away; the rest joins below
        for node in reversed(nodes):  # the outermost sum takes in first
            self._fold(node)
        self.absorbed -= set(outputs)
        self.last: dict[fx.Node, int] = dict.fromkeys(nodes, -1)
        for position, node in enumerate(nodes[:-1]):
            if node not in self.absorbed:
                for operand in self._operands(node):
                    self.last[operand] = position
        for node in outputs:
            self.last[node] = len(nodes)
        self.results: dict[fx.Node, str] = {}
        self.inputs_by_name: dict[str, fx.Node] = {}
        for node, name in zip(outputs, written, strict=True):
            self.results.setdefault(node, name)
        for position, node in enumerate(nodes[:-1]):
            self.known = self.known and (node in self.absorbed or self._node(node, position))
        for node, name in zip(outputs, written, strict=True):
            if self.known and self.text[node] != f"r[{name!r}]":
                self.lines.append(f"r[{name!r}].copy_({self.text[node]})")

    def compiled(self) -> Run | None:
        """The lines as a function, or None if an operation has no form that writes into a buffer."""
        if not self.known:
            return None
        namespace: dict[str, Any] = {"torch": torch}
        text = "\n    ".join(["def run(i, r, s, b):", *self.lines])
        exec(compile(text, "<poise pieces>", "exec"), namespace)  # our own text, from our own trace
        return namespace["run"]

    # -- products in sums -----------------------------------------------------------------------------------------------

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

    def _product(self, node: fx.Node) -> tuple[Any, Literal["", "addcmul", "addcdiv"], tuple[fx.Node, ...]] | None:
        """number, form and factors of a product, which is then absorbed."""
        if node.target is MUL and not all(map(self._is_tensor, node.args)):
            x, number = node.args if self._is_tensor(node.args[0]) else reversed(node.args)
            self.absorbed.add(node)
            assert isinstance(x, fx.Node)
            inner = self._product(x) if self._single(x) and all(map(self._is_tensor, x.args)) else None
            return (number, *inner[1:]) if inner is not None else (number, "", (x,))
        if node.target in (MUL, DIV) and all(map(self._is_tensor, node.args)):
            self.absorbed.add(node)
            return None, "addcmul" if node.target is MUL else "addcdiv", tuple(node.args)  # type: ignore[return-value]
        return None

    def _is_tensor(self, arg: Any) -> bool:
        return isinstance(arg, fx.Node) and arg not in self.scalar

    def _single(self, node: fx.Node) -> bool:
        """Whether a value is used once, and may disappear."""
        uses = sum(user.all_input_nodes.count(node) for user in node.users)
        return uses == 1 and node.target in (MUL, DIV) and not node.kwargs and node not in self.absorbed

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        """The values that a node's own operation reads."""
        if node in self.folded:
            return [self.folded[node].base, *self.folded[node].factors]
        return node.all_input_nodes

    # -- lines ----------------------------------------------------------------------------------------------------------

    def _node(self, node: fx.Node, position: int) -> bool:
        if node.op == "placeholder":
            order = len(self.inputs_by_name)
            if order < len(self.inputs):
                self.text[node] = f"i[{self.inputs[order]!r}]"
                self.inputs_by_name[self.inputs[order]] = node
            else:
                self.inputs_by_name[f"#{order}"] = node
                self.text[node] = ["s", "noise", "index"][order - len(self.inputs)]
            return True
        if node.target in (torch.ops.aten.unbind.int, torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            source: Any = node.args[0]
            self.text[node] = self.text[source]
            return node.target == torch.ops.aten.unbind.int and self.text[source] == "s"
        if node.target is operator.getitem:
            self.text[node] = f"s[{node.args[1]}]"
            return self.text[node.args[0]] == "s"  # type: ignore[index]
        if node.kwargs:
            return False
        if node in self.folded:
            return self._sum(node, position)
        operands = [self._operand(arg) for arg in node.args]
        if any(operand is None for operand in operands):
            return False
        name = BINARY.get(node.target) or UNARY.get(node.target)
        if name is None:
            return False
        spelled = [text for text, _ in operands]  # type: ignore[misc]
        scalars = [is_scalar for _, is_scalar in operands]  # type: ignore[misc]
        if all(scalars):
            if name in SYMBOL:
                self.text[node] = f"({spelled[0]} {SYMBOL[name]} {spelled[1]})"
            else:
                self.text[node] = f"(-{spelled[0]})" if name == "neg" else f"({spelled[0]}) ** 0.5"
            return name in SYMBOL or name in ("neg", "sqrt")
        self._release(node, position)
        out = self._target(node, position)
        self.text[node] = out
        self._call(name, spelled, scalars, out)
        return True

    def _sum(self, node: fx.Node, position: int) -> bool:
        folded = self.folded[node]
        spelled = [self._operand(x) for x in (folded.base, *folded.factors)]
        number = ("1.0", True) if folded.number is None else self._operand(folded.number)
        if number is None or any(x is None for x in spelled):
            return False
        texts = [text for text, _ in spelled]  # type: ignore[misc]
        self._release(node, position)
        out = self.text[node] = self._target(node, position)
        minus = "-" if folded.sign < 0 else ""
        if folded.form:
            self.lines.append(f"torch.{folded.form}({', '.join(texts)}, value={minus}{number[0]}, out={out})")
        else:
            self.lines.append(f"torch.add({', '.join(texts)}, alpha={minus}{number[0]}, out={out})")
        return True

    def _call(self, name: str, spelled: list[str], scalars: list[bool], out: str) -> None:
        if len(spelled) == 2 and scalars[0]:  # torch wants the tensor first
            number, tensor = spelled
            if name in ("mul", "add"):
                self.lines.append(f"torch.{name}({tensor}, {number}, out={out})")
            elif name == "sub":
                self.lines.append(f"torch.neg({tensor}, out={out}).add_({number})")
            elif name == "div":
                self.lines.append(f"torch.reciprocal({tensor}, out={out}).mul_({number})")
            else:
                self.known = False
        elif len(spelled) == 2 and scalars[1] and name in ("maximum", "minimum"):
            self.lines.append(f"torch.clamp({spelled[0]}, {'min' if name == 'maximum' else 'max'}={spelled[1]}, out={out})")
        else:
            self.lines.append(f"torch.{name}({', '.join(spelled)}, out={out})")

    def _operand(self, arg: Any) -> tuple[str, bool] | None:
        if isinstance(arg, (int, float)):
            return repr(arg), True
        if isinstance(arg, fx.Node) and arg in self.text and self.text[arg] not in ("s", "noise", "index"):
            return self.text[arg], arg in self.scalar
        return None

    def _release(self, node: fx.Node, position: int) -> None:
        """Buffers whose value is used here for the last time may be overwritten by this very operation."""
        for arg in set(self._operands(node)):
            text = self.text.get(arg, "")
            if self.last[arg] == position and text.startswith("b["):
                self.free.append(int(text[2:-1]))

    def _target(self, node: fx.Node, position: int) -> str:
        """Where a value goes: into the result that it is or becomes by one more operation, if the input there is dead."""
        for name in (self.results.get(node), self._becomes(node)):
            if name is not None and self._vacant(name, node, position):
                return f"r[{name!r}]"
        if not self.free:
            self.free.append(self.buffers)
            self.buffers += 1
        return f"b[{self.free.pop()}]"

    def _becomes(self, node: fx.Node) -> str | None:
        users = [user for user in self.last if user not in self.absorbed and node in self._operands(user)]
        return self.results.get(users[0]) if len(users) == 1 else None

    def _vacant(self, name: str, node: fx.Node, position: int) -> bool:
        source = self.inputs_by_name.get(name)
        if source is not None and self.last[source] > position:
            return False
        there = f"r[{name!r}]"
        return all(self.last[other] <= position for other, text in self.text.items() if text == there and other is not node)


def _scalars(nodes: Sequence[fx.Node], inputs: int) -> set[fx.Node]:
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


def _gather_numbers(graph: fx.Graph, inputs: int) -> None:
    """Move numbers outwards, where a sum can take them in; the order of products of tensors and numbers is all that changes.

    (a x) / y -> a (x / y);    b (a x) -> (a b) x;    p - a x -> (-a) x + p, for a product p that is more than a number's
    """
    scalars = _scalars(list(graph.nodes), inputs)

    def split(arg: Any) -> tuple[fx.Node, Any] | None:
        """The tensor and the number of a product of the two."""
        if not isinstance(arg, fx.Node) or arg.target is not MUL or arg.kwargs or arg in scalars:
            return None
        for x, number in (arg.args, arg.args[::-1]):
            if isinstance(x, fx.Node) and x not in scalars and (number in scalars or isinstance(number, (int, float))):
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
        if all(arg in scalars or not isinstance(arg, fx.Node) for arg in args):
            scalars.add(made)
        return made

    for node in list(graph.nodes):
        if node.target not in (MUL, DIV, SUB) or node.kwargs or node in scalars:
            continue
        made = None
        with graph.inserting_before(node):
            if node.target is DIV and (inner := lone(node.args[0])) is not None and node.args[1] not in scalars:
                made = call(MUL, call(DIV, inner[0], node.args[1]), inner[1])
            elif (outer := split(node)) is not None and (inner := lone(outer[0])) is not None:
                made = call(MUL, inner[0], times(inner[1], outer[1]))
            elif node.target is SUB and (taken := lone(node.args[1])) is not None and more(node.args[0]):
                made = call(ADD, call(MUL, taken[0], times(taken[1], -1.0)), node.args[0])
        if made is not None:
            node.replace_all_uses_with(made)
    graph.eliminate_dead_code()
