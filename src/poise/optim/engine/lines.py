"""A traced graph as lines of Python that write every value into a place that is there already.

A value goes straight into the result that it becomes wherever the old one is no longer needed, else into a buffer that is free:
fewer tensors to hold in the cache. Which operations are one line is said by `folding`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .folding import Sums, gather_numbers, scalars

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
        gather_numbers(graph, len(inputs))
        nodes = list(graph.nodes)
        outputs: list[Any] = list(nodes[-1].args[0])
        self.scalar = scalars(nodes, len(inputs))
        sums = Sums(nodes, outputs, self.scalar)
        self.folded, self.absorbed = sums.folded, sums.absorbed
        self.last: dict[fx.Node, int] = dict.fromkeys(nodes, -1)
        for position, node in enumerate(nodes[:-1]):
            if node not in self.absorbed:
                for operand in self._reads(node):
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

    def _reads(self, node: fx.Node) -> list[fx.Node]:
        """The values that a node's own operation reads."""
        if node in self.folded:
            return [self.folded[node].base, *self.folded[node].factors]
        return node.all_input_nodes

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
            source = node.all_input_nodes[0]
            self.text[node] = self.text[source]
            return node.target == torch.ops.aten.unbind.int and self.text[source] == "s"
        if node.target is operator.getitem:
            self.text[node] = f"s[{node.args[1]}]"
            return self.text[node.all_input_nodes[0]] == "s"
        if node.kwargs:
            return False
        if node in self.folded:
            return self._sum(node, position)
        spelled, numbers = self._spelled(node.args), [not self._is_tensor(arg) for arg in node.args]
        name = BINARY.get(node.target) or UNARY.get(node.target)
        if spelled is None or name is None:
            return False
        if all(numbers):
            if name in SYMBOL:
                self.text[node] = f"({spelled[0]} {SYMBOL[name]} {spelled[1]})"
            else:
                self.text[node] = f"(-{spelled[0]})" if name == "neg" else f"({spelled[0]}) ** 0.5"
            return name in SYMBOL or name in ("neg", "sqrt")
        self._release(node, position)
        out = self._target(node, position)
        self.text[node] = out
        self._call(name, spelled, numbers, out)
        return True

    def _sum(self, node: fx.Node, position: int) -> bool:
        folded = self.folded[node]
        spelled = self._spelled((*self._reads(node), 1.0 if folded.number is None else folded.number))
        if spelled is None:
            return False
        *tensors, number = spelled
        self._release(node, position)
        out = self.text[node] = self._target(node, position)
        factor = f"{'-' if folded.sign < 0 else ''}{number}"
        name, keyword = (folded.form, "value") if folded.form else ("add", "alpha")
        self.lines.append(f"torch.{name}({', '.join(tensors)}, {keyword}={factor}, out={out})")
        return True

    def _call(self, name: str, spelled: list[str], numbers: list[bool], out: str) -> None:
        if len(spelled) == 2 and numbers[0]:  # torch wants the tensor first
            number, tensor = spelled
            if name in ("mul", "add"):
                self.lines.append(f"torch.{name}({tensor}, {number}, out={out})")
            elif name == "sub":
                self.lines.append(f"torch.neg({tensor}, out={out}).add_({number})")
            elif name == "div":
                self.lines.append(f"torch.reciprocal({tensor}, out={out}).mul_({number})")
            else:
                self.known = False
        elif len(spelled) == 2 and numbers[1] and name in ("maximum", "minimum"):
            self.lines.append(f"torch.clamp({spelled[0]}, {'min' if name == 'maximum' else 'max'}={spelled[1]}, out={out})")
        else:
            self.lines.append(f"torch.{name}({', '.join(spelled)}, out={out})")

    def _spelled(self, args: Sequence[Any]) -> list[str] | None:
        """Arguments as text, or None if one of them has none."""
        texts = [repr(arg) if isinstance(arg, (int, float)) else self.text.get(arg, "s") for arg in args]
        return None if any(text in ("s", "noise", "index") for text in texts) else texts

    def _is_tensor(self, arg: Any) -> bool:
        return isinstance(arg, fx.Node) and arg not in self.scalar

    def _release(self, node: fx.Node, position: int) -> None:
        """Buffers whose value is used here for the last time may be overwritten by this very operation."""
        for arg in set(self._reads(node)):
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
        users = [user for user in self.last if user not in self.absorbed and node in self._reads(user)]
        return self.results.get(users[0]) if len(users) == 1 else None

    def _vacant(self, name: str, node: fx.Node, position: int) -> bool:
        source = self.inputs_by_name.get(name)
        if source is not None and self.last[source] > position:
            return False
        there = f"r[{name!r}]"
        return all(self.last[other] <= position for other, text in self.text.items() if text == there and other is not node)
