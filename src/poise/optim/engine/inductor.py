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

# Sizes that tracing sees in place of the dynamic one. Large, so that inductor vectorizes; no power of two that a rule's own
# tables could have, so that nothing else is taken for the same size.
EXAMPLE_ELEMENTS = 8200
EXAMPLE_BLOCKS = 104


class Unsupported(RuntimeError):
    """Inductor's output is not of the form this file understands, or there is no compiler."""


@dataclass(frozen=True)
class Arg:
    """One tensor of a kernel: `shape` holds None where the dynamic size stands (first dimension only)."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | None, ...] = (None,)
    written: bool = False

    def example(self) -> Tensor:
        size = EXAMPLE_ELEMENTS if len(self.shape) == 1 else EXAMPLE_BLOCKS
        return torch.zeros([size if d is None else d for d in self.shape], dtype=self.dtype)


def trace(fn: Callable[..., dict[str, Tensor]], args: Sequence[Arg], decompositions: Any = None) -> torch.fx.GraphModule:
    """`fn` as a graph of aten operations that ends by copying its results into the written arguments."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def flat(*tensors: Tensor) -> tuple[()]:
        named = {arg.name: tensor for arg, tensor in zip(args, tensors, strict=True)}
        for arg, tensor in zip(args, tensors, strict=True):
            for dim, size in enumerate(arg.shape):
                if size is not None and tensor.shape[dim] != size:  # also fixes the size in the graph
                    raise ValueError(f"{arg.name} has shape {tuple(tensor.shape)}")
        results = fn(**named)
        for arg in args:
            if arg.written:
                named[arg.name].copy_(results[arg.name])
        return ()

    return make_fx(flat, tracing_mode="symbolic", decomposition_table=decompositions)(*(arg.example() for arg in args))


def source_of(fn: Callable[..., dict[str, Tensor]], args: Sequence[Arg]) -> str:
    """C++ source of the kernels that inductor generates for `fn`, and the entry point over them."""
    from torch._guards import detect_fake_mode
    from torch._inductor import config
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    try:
        graph = trace(fn, args, select_decomp_table())
        inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        fake = detect_fake_mode(inputs)
        assert fake is not None
        with (
            config.patch({"cpp.threads": 1, "cpp_wrapper": False, "size_asserts": False, "cpp.enable_kernel_profile": False}),
            V.set_fake_mode(fake),
            V.set_debug_handler(DebugContext()),
        ):
            lowered = GraphLowering(graph, example_inputs=inputs, shape_env=fake.shape_env, is_inference=True)
            with V.set_graph_handler(lowered):
                lowered.run(*inputs)
                code = lowered.codegen()[0]
        return _wrap(str(getattr(code, "value", code)), args)
    except Unsupported:
        raise
    except Exception as error:
        raise Unsupported(f"inductor could not lower it: {type(error).__name__}: {error}") from error


# Two things that at::vec does by way of memory: a load of integers with a count goes through a buffer in two halves, which
# the processor cannot forward to the load that follows, and a bit cast goes through a scalar loop. Both cost more than the
# arithmetic around them (measured: decoding int8 took five times as long with them).
PRELUDE = r"""
#include <torch/csrc/inductor/cpp_prefix.h>
#if INDUCTOR_USE_VECTOR_TYPES()
namespace {
template <typename T> inline at::vec::Vectorized<T> poise_load(const void* p, int64_t n) {
  if (n == at::vec::Vectorized<T>::size()) return at::vec::Vectorized<T>::loadu(p);
#if defined(CPU_CAPABILITY_AVX2) && !defined(CPU_CAPABILITY_AVX512)
  if constexpr (sizeof(T) == 1) {
    if (n == 8) return at::vec::Vectorized<T>(_mm256_zextsi128_si256(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
    if (n == 16) return at::vec::Vectorized<T>(_mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
#elif defined(CPU_CAPABILITY_AVX512)
  if constexpr (sizeof(T) == 1) {
    if (n == 16) return at::vec::Vectorized<T>(_mm512_zextsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    if (n == 32) return at::vec::Vectorized<T>(_mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
  }
#endif
  return at::vec::Vectorized<T>::loadu(p, n);
}
template <typename T, int N> inline at::vec::VectorizedN<T, N> poise_load_n(const void* p, int64_t n) {
  constexpr int size = at::vec::Vectorized<T>::size();
  if (n != N * size) return at::vec::VectorizedN<T, N>::loadu(p, n);
  at::vec::VectorizedN<T, N> result;
  for (int i = 0; i < N; ++i) result[i] = at::vec::Vectorized<T>::loadu(reinterpret_cast<const T*>(p) + i * size);
  return result;
}
template <typename To, typename From> inline at::vec::Vectorized<To> poise_bits(const at::vec::Vectorized<From>& v) {
  return at::vec::cast<To, From>(v);
}
template <typename To, typename From, int N>
inline at::vec::VectorizedN<To, N> poise_bits(const at::vec::VectorizedN<From, N>& v) {
  at::vec::VectorizedN<To, N> result;
  for (int i = 0; i < N; ++i) result[i] = at::vec::cast<To, From>(v[i]);
  return result;
}
}  // namespace
#endif
"""
LOAD = re.compile(r"at::vec::Vectorized<(u?int\d+_t)>::loadu\(")
LOAD_N = re.compile(r"at::vec::VectorizedN<(u?int\d+_t),\s*(\d+)>::loadu\(")
BITS = re.compile(
    r"\[&\]\(\)\s*\{\s*__at_align__ std::array<(?P<source>\w+), (?P<size>\d+)> tmpbuf0;\s*"
    r"(?P<value>\w+)\.store\(tmpbuf0\.data\(\), static_cast<int64_t>\((?P=size)\)\);\s*"
    r"__at_align__ std::array<(?P<target>\w+), (?P=size)> tmpbuf_out;\s*"
    r"for \(int i = 0; i < static_cast<int64_t>\((?P=size)\); i\+\+\)\s*\{\s*"
    r"tmpbuf_out\[i\] = c10::bit_cast<(?P=target)>\(tmpbuf0\[i\]\);\s*\}\s*"
    r"return\s+at::vec::VectorizedN?<(?P=target)(?:, \d+)?>::loadu"
    r"\(tmpbuf_out\.data\(\), static_cast<int64_t>\((?P=size)\)\);\s*"
    r"\}\s*\(\)"
)
WIDE = {"float", "int32_t"}  # both four bytes: what at::vec::cast turns into each other


def faster(source: str) -> str:
    """The same kernel without detours through memory; whatever does not look as expected stays as it is."""

    def bits(found: re.Match[str]) -> str:
        if {found["source"], found["target"]} != WIDE:
            return found[0]
        return f"poise_bits<{found['target']}>({found['value']})"

    return LOAD_N.sub(r"poise_load_n<\1, \2>(", LOAD.sub(r"poise_load<\1>(", BITS.sub(bits, source)))


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
        self.temporaries = 0

    def render(self, body: list[ast.stmt]) -> str:
        for statement in body:
            self.statement(statement)
        parts: list[str] = []
        for index, (name, (_, source)) in enumerate(self.sources.items()):
            # one file for all: each kernel gets its own name and internal linkage
            renamed, count = re.subn(r'extern "C"\s+void\s+kernel\(', f"static void {name}_{index}(", faster(source))
            if count != 1:
                raise Unsupported("a kernel of unexpected form")
            self.lines = [line.replace(f"{name}@", f"{name}_{index}") for line in self.lines]
            parts.append(renamed)
        buffers = [f"static thread_local std::vector<char> temporary{i};" for i in range(self.temporaries)]
        entry = ['extern "C" void poise_run(char** p, int64_t n) {', *self.lines, "}"]
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
                self.sizes[name] = "n" if size is None else str(size)
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
