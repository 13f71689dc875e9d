"""Plain tensor math -> C++ source, by way of inductor.

Only generated source is taken from inductor (`GraphLowering.codegen`), not its runtime: what is read out of it is checked
statement by statement, and anything unexpected raises `Unsupported`, on which the engine falls back to `torch.compile`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .rewrite import PRELUDE, faster, unaliased

# Sizes that tracing sees in place of the dynamic one. Large, so that inductor vectorizes; no power of two that a rule's own
# tables could have, so that nothing else is taken for the same size.
EXAMPLE_ELEMENTS = 8200
EXAMPLE_BLOCKS = 104
EXAMPLE_LENGTH = 1016
LENGTH = -1  # in a shape: the second dynamic size, the elements of a block


class Unsupported(RuntimeError):
    """Inductor's output is not of the form this file understands, or there is no compiler."""


@dataclass(frozen=True)
class Arg:
    """One tensor of a kernel: `shape` begins with None, the dynamic size, unless it is fixed; LENGTH may follow."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | None, ...] = (None,)
    written: bool = False

    def example(self) -> Tensor:
        size = EXAMPLE_ELEMENTS if len(self.shape) == 1 else EXAMPLE_BLOCKS
        shape = [size if d is None else EXAMPLE_LENGTH if d == LENGTH else d for d in self.shape]
        return torch.zeros(shape, dtype=self.dtype)


def trace(fn: Callable[..., dict[str, Tensor]], args: Sequence[Arg], decompositions: Any = None) -> torch.fx.GraphModule:
    """`fn` as a graph of aten operations that ends by copying its results into the written arguments."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def flat(*tensors: Tensor) -> tuple[()]:
        named = {arg.name: tensor for arg, tensor in zip(args, tensors, strict=True)}
        for arg, tensor in zip(args, tensors, strict=True):
            for dim, size in enumerate(arg.shape):
                if size is not None and size != LENGTH and tensor.shape[dim] != size:  # also fixes the size in the graph
                    raise ValueError(f"{arg.name} has shape {tuple(tensor.shape)}")
        results = fn(**named)
        for arg in args:
            if arg.written:
                named[arg.name].copy_(results[arg.name])
        return ()

    return make_fx(flat, tracing_mode="symbolic", decomposition_table=decompositions)(*(arg.example() for arg in args))


def source_of(fn: Callable[..., dict[str, Tensor]], args: Sequence[Arg], compiler: str | None = None) -> str:
    """C++ source of the kernels that inductor generates for `fn`, and the entry point over them.

    Args:
        compiler: its path; inductor's own choice was made when it was imported.
    """
    from torch._guards import detect_fake_mode
    from torch._inductor import config
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    blocked = any(LENGTH in arg.shape for arg in args)

    class Lowering(GraphLowering):
        """Works out what a rule has one of for each block before the loop over its elements, which else does so every time."""

        def run_node(self, n: torch.fx.Node) -> Any:
            result: Any = super().run_node(n)
            if blocked and n.op == "call_function" and _one_a_block(n) and not all(map(_one_a_block, n.users)):
                result.realize()
            return result

    try:
        graph = trace(fn, args, select_decomp_table())
        inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        fake = detect_fake_mode(inputs)
        assert fake is not None
        settings: dict[str, Any] = {"cpp.threads": 1, "cpp_wrapper": False, "size_asserts": False}
        settings |= {"cpp.enable_kernel_profile": False} | ({"cpp.cxx": (None, compiler)} if compiler else {})
        with (
            config.patch(settings),
            V.set_fake_mode(fake),
            V.set_debug_handler(DebugContext()),
        ):
            lowered = Lowering(graph, example_inputs=inputs, shape_env=fake.shape_env, is_inference=True)
            with V.set_graph_handler(lowered):
                lowered.run(*inputs)
                code = lowered.codegen()[0]
        return _wrap(str(getattr(code, "value", code)), args)
    except Unsupported:
        raise
    except Exception as error:
        raise Unsupported(f"inductor could not lower it: {type(error).__name__}: {error}") from error


def _one_a_block(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.ndim == 2 and isinstance(value.shape[0], torch.SymInt) and value.shape[1] == 1


def _wrap(code: str, args: Sequence[Arg]) -> str:
    """Read kernels and calls out of inductor's Python wrapper, and write them as one C++ file."""
    module = ast.parse(code)
    sources: dict[str, tuple[list[str], str]] = {}
    body: list[ast.stmt] = []
    for node in ast.walk(module):
        match node:
            case ast.Assign(
                targets=[ast.Name(id=name)],
                value=ast.Call(func=ast.Attribute(attr="cpp_pybinding"), args=[types, ast.Constant(value=str(source))]),
            ):
                sources[name] = (ast.literal_eval(types), source)
            case ast.FunctionDef(name="call"):
                body = node.body
    if not sources or not body:
        raise Unsupported("no kernel or no call found in inductor's output")
    return _Wrapper(args, sources).render(body)


class _Wrapper:
    """Translates the statements of inductor's `call` into calls of the kernels."""

    def __init__(self, args: Sequence[Arg], sources: dict[str, tuple[list[str], str]]) -> None:
        self.args = args
        self.sources = sources
        self.pointers: dict[str, str] = {}  # Python name -> C expression of its pointer
        self.shapes: dict[str, tuple[int | None, ...]] = {}
        self.sizes: dict[str, str] = {}  # size symbol -> C expression
        self.lines: list[str] = []
        self.alone: dict[str, list[bool]] = {}  # of each kernel's pointers: no other argument is the same buffer
        self.temporaries = 0

    def render(self, body: list[ast.stmt]) -> str:
        for statement in body:
            self.statement(statement)
        parts: list[str] = []
        for index, (name, (_, source)) in enumerate(self.sources.items()):
            # one file for all: each kernel gets its own name and internal linkage
            found = re.search(r'extern "C"\s+void\s+kernel(\([^)]*\))', source)
            if found is None:
                raise Unsupported("a kernel of unexpected form")
            signature = f"static void {name}_{index}{unaliased(found[1], self.alone[name])}"
            renamed = source[: found.start()] + signature + faster(source[found.end() :])
            self.lines = [line.replace(f"{name}@", f"{name}_{index}") for line in self.lines]
            parts.append(renamed)
        buffers = [f"static thread_local std::vector<char> temporary{i};" for i in range(self.temporaries)]
        entry = ['extern "C" void poise_run(char** p, int64_t n, int64_t length) {', *self.lines, "}"]
        return "\n".join(["#include <vector>", PRELUDE, *parts, *buffers, *entry, ""])

    def statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Name(id="args")):
                for index, (target, arg) in enumerate(zip(names, self.args, strict=True)):
                    assert isinstance(target, ast.Name)
                    self.pointers[target.id], self.shapes[target.id] = f"p[{index}]", arg.shape
            case ast.Assign(
                targets=[ast.Name(id=name)], value=ast.Call(func=ast.Attribute(value=ast.Name(id=of), attr="size"), args=[])
            ):
                self.shapes[name] = self.shapes[of]
            case ast.Assign(
                targets=[ast.Name(id=name)], value=ast.Subscript(value=ast.Name(id=of), slice=ast.Constant(value=int(dim)))
            ):
                size = self.shapes[of][dim]
                self.sizes[name] = "n" if size is None else "length" if size == LENGTH else str(size)
            case ast.Assign(
                targets=[ast.Name(id=name)], value=ast.Call(func=ast.Name(id="empty_strided_cpu"), args=[shape, _, dtype])
            ):
                entries = (
                    " * ".join([f"(int64_t)({self.size(d)})" for d in shape.elts] or ["1"])
                    if isinstance(shape, ast.Tuple)
                    else ""
                )
                width = getattr(torch, ast.unparse(dtype).removeprefix("torch.")).itemsize
                buffer = f"temporary{self.temporaries}"
                self.temporaries += 1
                self.lines.append(
                    f"  if ((int64_t){buffer}.size() < ({entries}) * {width}) {buffer}.resize(({entries}) * {width});"
                )
                self.pointers[name] = f"{buffer}.data()"
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Name(id=of)) if of in self.pointers:
                self.pointers[name] = self.pointers[of]
            case ast.Expr(value=ast.Call(func=ast.Name(id=name), args=values)) if name in self.sources:
                types, _ = self.sources[name]
                given = [self.value(value, kind) for value, kind in zip(values, types, strict=True)]
                buffers = [text.partition(")")[2] for text, kind in zip(given, types, strict=True) if kind.endswith("*")]
                alone = [buffers.count(buffer) == 1 for buffer in buffers]
                self.alone[name] = [a and b for a, b in zip(alone, self.alone.get(name, alone), strict=True)]
                self.lines.append(f"  {name}@({', '.join(given)});")
            case ast.Delete() | ast.Return() | ast.Assert() | ast.Pass():
                pass
            case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id="args"), attr="clear"))):
                pass
            case ast.Expr(value=ast.Call(func=ast.Name(id="assert_size_stride"))):
                pass
            case _:
                raise Unsupported(f"statement not understood: {ast.unparse(node)}")

    def value(self, node: ast.expr, kind: str) -> str:
        if kind.endswith("*"):
            if isinstance(node, ast.Name) and node.id in self.pointers:
                return f"({kind}){self.pointers[node.id]}"
            raise Unsupported(f"argument not understood: {ast.unparse(node)}")
        return f"({kind.removeprefix('const ')})({self.size(node)})"

    def size(self, node: ast.expr) -> str:
        """A size expression over constants and symbols, in C."""
        match node:
            case ast.Constant(value=int(value)):
                return str(value)
            case ast.Name(id=name) if name in self.sizes:
                return self.sizes[name]
            case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Mult() | ast.FloorDiv() as op, right=right):
                sign = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.FloorDiv: "/"}[type(op)]  # sizes are never negative
                return f"({self.size(left)} {sign} {self.size(right)})"
            case _:
                raise Unsupported(f"size not understood: {ast.unparse(node)}")
