"""Plain tensor math without a compiler, as fast as torch's own operations allow.

Evaluating a rule on whole tensors allocates and streams a temporary for every operation. Here the traced operations are
written out once as calls with `out=` buffers and run over pieces small enough to stay in cache, on as many Python threads as
torch would use; torch releases the interpreter inside each operation, and a piece is too small for it to start threads itself.
"""

from __future__ import annotations

import operator
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from .program import Program

PIECE = 16384  # elements: below torch's own threshold for threads (32768), and a few of them fit a core's cache

Run = Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Sequence[float], Sequence[Tensor]], None]


class Pieces:
    """A program run over pieces; a result that replaces an input overwrites it."""

    def __init__(self, program: Program, compute: torch.dtype) -> None:
        self.program, self.written = program, program.results()
        self.inputs = ["g", *([] if program.begins else ["u"]), "x", *program.keys, *(f"feed:{f}" for f in program.feeds)]
        self.lines = _Lines(self.inputs, self.written, self._trace(compute))
        self.run = self.lines.compiled()

    def _trace(self, compute: torch.dtype) -> fx.Graph:
        from torch.fx.experimental.proxy_tensor import make_fx

        def flat(*values: Tensor) -> tuple[Tensor, ...]:
            made = self.program(dict(zip([*self.inputs, "row", "noise"], values[:-1], strict=True)), None, values[-1])
            return tuple(made[name] for name in self.written)

        example = [torch.ones(8, dtype=compute) for _ in self.inputs]
        example += [
            torch.ones(len(self.program.names), dtype=compute),
            torch.zeros(2, dtype=torch.int32),
            torch.zeros(8, dtype=torch.int32),
        ]
        return make_fx(flat)(*example).graph

    def __call__(self, tensors: Mapping[str, Tensor], row: Mapping[str, float], index: Tensor) -> dict[str, Tensor]:
        """The results for flat `tensors`."""
        used = {name: tensors[name] for name in self.inputs}
        if self.run is None or not all(t.is_contiguous() for t in used.values()):
            numbers = torch.tensor(list(row.values()), dtype=tensors["x"].dtype)
            return self.program({**tensors, "row": numbers}, None, index)
        size = tensors["x"].numel()
        results = {name: used[name] if name in used else torch.empty_like(tensors["x"]) for name in self.written}
        numbers = [row[name] for name in self.program.names]
        run, dtype, count = self.run, tensors["x"].dtype, self.lines.buffers

        def piece(start: int) -> None:
            end = min(start + PIECE, size)
            window = {name: t[start:end] for name, t in used.items()}
            run(
                window,
                {name: window.get(name, results[name][start:end]) for name in results},
                numbers,
                _buffers(end - start, dtype, count),
            )

        starts = range(0, size, PIECE)
        if len(starts) > 1 and torch.get_num_threads() > 1:
            list(_threads(os.getpid()).map(piece, starts))
        else:
            for start in starts:
                piece(start)
        return results


@cache
def _threads(pid: int) -> ThreadPoolExecutor:
    """One pool for each process: threads do not survive a fork."""
    return ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="poise")


_local = threading.local()


def _buffers(size: int, dtype: torch.dtype, count: int) -> list[Tensor]:
    """This thread's scratch, of the wanted size."""
    held: list[Tensor] = _local.__dict__.setdefault(str(dtype), [])
    held += [torch.empty(PIECE, dtype=dtype) for _ in range(count - len(held))]
    return held[:count] if size == PIECE else [t[:size] for t in held[:count]]


BINARY: dict[Any, str] = {
    torch.ops.aten.mul.Tensor: "mul", torch.ops.aten.add.Tensor: "add", torch.ops.aten.sub.Tensor: "sub",
    torch.ops.aten.div.Tensor: "div", torch.ops.aten.maximum.default: "maximum", torch.ops.aten.minimum.default: "minimum",
}  # fmt: skip
UNARY = {
    getattr(torch.ops.aten, name).default: name
    for name in ("sqrt", "sign", "abs", "neg", "reciprocal", "rsqrt", "exp", "square")
}
SYMBOL = {"mul": "*", "add": "+", "sub": "-", "div": "/"}


class _Lines:
    """A traced graph as lines of Python over `i` (inputs), `r` (results), `s` (scalars) and `b` (buffers).

    Every value is written into its result where the input of that name is no longer needed, else into a free buffer.
    """

    def __init__(self, inputs: Sequence[str], written: Sequence[str], graph: fx.Graph) -> None:
        self.inputs, self.written = inputs, written
        self.lines: list[str] = []
        self.buffers = 0
        self.free: list[int] = []
        self.text: dict[fx.Node, str] = {}  # how a value is spelled
        self.scalar: set[fx.Node] = set()
        self.known = True
        nodes = list(graph.nodes)
        self.last = {node: max([nodes.index(user) for user in node.users], default=-1) for node in nodes}
        self.results: dict[fx.Node, str] = {}
        self.inputs_by_name: dict[str, fx.Node] = {}
        outputs: list[Any] = list(nodes[-1].args[0])
        for node, name in zip(outputs, written, strict=True):
            self.results.setdefault(node, name)
        for position, node in enumerate(nodes[:-1]):
            self.known = self.known and self._node(node, position)
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
            self.scalar.add(node)
            return self.text[node.args[0]] == "s"  # type: ignore[index]
        if node.kwargs:
            return False
        operands = [self._operand(arg) for arg in node.args]
        if any(operand is None for operand in operands):
            return False
        name = BINARY.get(node.target) or UNARY.get(node.target)
        if name is None:
            return False
        spelled = [text for text, _ in operands]  # type: ignore[misc]
        scalars = [is_scalar for _, is_scalar in operands]  # type: ignore[misc]
        if all(scalars):
            self.scalar.add(node)
            self.text[node] = f"({spelled[0]} {SYMBOL[name]} {spelled[1]})" if name in SYMBOL else f"({spelled[0]}) ** 0.5"
            return name in SYMBOL or name == "sqrt"
        self._release(node, position)
        out = self._target(node, position)
        self.text[node] = out
        self._call(name, spelled, scalars, out)
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
        for arg in set(node.all_input_nodes):
            text = self.text.get(arg, "")
            if self.last[arg] == position and text.startswith("b["):
                self.free.append(int(text[2:-1]))

    def _target(self, node: fx.Node, position: int) -> str:
        name = self.results.get(node)
        if name is not None:
            source = self.inputs_by_name.get(name)
            if source is None or self.last[source] <= position:
                return f"r[{name!r}]"
        if not self.free:
            self.free.append(self.buffers)
            self.buffers += 1
        return f"b[{self.free.pop()}]"
