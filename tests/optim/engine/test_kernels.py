"""Compiled kernels: made once, found on disk again, and given up for something slower where they cannot be made."""

from __future__ import annotations

import ast
import ctypes
import functools
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conformance.problems import draw, leaves, play, same
from optim.toys import heavy
from torch import Tensor

from poise.optim import Context, Optimizer, Param, Slot, Transform, chain
from poise.optim.engine import bucket, inductor, kernels
from poise.optim.engine.inductor import Arg, Unsupported
from poise.optim.transform import State

ARGS = [
    Arg("a", torch.float32),
    Arg("row", torch.float32, (2,)),
    Arg("b", torch.float32, written=True),
    Arg("sum", torch.float64, (1,), written=True),
]


def scaled(a: Tensor, row: Tensor, b: Tensor, sum: Tensor) -> dict[str, Tensor]:
    return {"b": a * row[0] + b * row[1], "sum": (a * a).double().sum().reshape(1)}


def call(kernel: kernels.Kernel, *arrays: Any, n: int) -> None:
    run = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)(kernel.address)
    pointers = np.array([a.ctypes.data for a in arrays], dtype=np.int64)
    run(pointers.ctypes.data, n, 1)


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every library that is compiled from here on; the process has forgotten those it has loaded."""
    made: list[Path] = []
    original = kernels.build

    def build(source: str, path: Path, builder: Any) -> None:
        made.append(path)
        original(source, path, builder)

    monkeypatch.setattr(kernels, "build", build)
    monkeypatch.setattr(kernels, "_loaded", {})
    return made


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, in a folder whose name has a space in it, as on a Mac or under a user's full name."""
    folder = tmp_path / "my cache"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    return folder / "poise"


def test_a_kernel_does_what_its_function_says_and_is_found_on_disk_again(
    empty_cache: Path, compilations: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = kernels.native(scaled, ARGS).result()
    assert compilations == list(empty_cache.glob("*.so"))
    for n in (1, 7, 1000):
        a, b, total = np.arange(n, dtype=np.float32), np.ones(n, dtype=np.float32), np.zeros(1)
        call(kernel, a, np.array([2.0, 3.0], dtype=np.float32), b, total, n=n)
        assert np.array_equal(b, 2 * np.arange(n) + 3)
        assert total[0] == (np.arange(n) ** 2.0).sum()
    # asked again: the very one; by a process that begins: from disk, without lowering it anew
    assert kernels.native(scaled, ARGS).result() is kernel
    monkeypatch.setattr(kernels, "_loaded", {})
    monkeypatch.setattr(kernels, "source_of", None)
    kernels.native(scaled, ARGS).result()
    assert len(compilations) == 1
    left = [path.name for path in empty_cache.iterdir() if not path.name.startswith("header-") and ".h" not in path.suffixes]
    assert left == [compilations[0].name], "nothing else is left behind, but for headers that are being parsed"


def test_another_function_or_another_type_is_another_kernel(compilations: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []
    monkeypatch.setattr(kernels, "source_of", lambda fn, args, compiler: "")
    monkeypatch.setattr(kernels, "_build", lambda source, path, args: keys.append(path.stem))
    monkeypatch.setattr(kernels.Path, "exists", lambda path: False)
    first = [Arg("a", torch.float32), Arg("b", torch.float32, written=True)]
    double = [Arg("a", torch.float64), Arg("b", torch.float64, written=True)]
    for fn, args in [
        (lambda a, b: {"b": a + b}, first),
        (lambda a, b: {"b": a - b}, first),
        (lambda a, b: {"b": a + 2 * b}, first),
        (lambda a, b: {"b": a + b}, double),
        (lambda a, b: {"b": a + b}, first),
    ]:
        kernels.native(fn, args).result()
    assert len(keys) == 4  # the last is the first again
    assert len(set(keys)) == 4


def test_an_optimizer_built_twice_compiles_once(compilations: list[Path]) -> None:
    """And a second group, another size or another learning rate need nothing new."""
    start, grads = draw([(8, 5)], 1, dtype=torch.float32)
    params = leaves(start)
    play(Optimizer(params, heavy(), lr=0.1, backend="tiles"), params, grads)
    before, asked = len(compilations), kernels.compiled_count()
    for shapes, lr in [([(8, 5)], 0.1), ([(70, 3), (2,), ()], 0.7)]:
        start, grads = draw(shapes, 2, dtype=torch.float32)
        params = leaves(start)
        play(Optimizer([{"params": [p]} for p in params], heavy(), lr=lr, backend="tiles"), params, grads)
    assert (len(compilations), kernels.compiled_count()) == (before, asked)


# -- what is read out of inductor --------------------------------------------------------------------------------------

KERNEL = """
cpp_fused_0 = async_compile.cpp_pybinding(['const float*', 'float*', 'const int64_t'], '''
#include <cstdint>
extern "C"  void kernel(const float* in_ptr0, float* out_ptr0, const int64_t ks0)
{ for (int64_t i = 0; i < ks0; ++i) out_ptr0[i] = 2 * in_ptr0[i]; }
''')
"""
CALL = """
def call(self, args):
    arg0_1, arg1_1 = args
    args.clear()
    arg0_1_size = arg0_1.size()
    s0 = arg0_1_size[0]
    assert_size_stride(arg0_1, (s0,), (1,))
    buf0 = empty_strided_cpu((s0,), (1,), torch.float32)
    {}
    del arg0_1
    return ()
"""
TWO = [Arg("a", torch.float32), Arg("b", torch.float32, written=True)]


def _wrapped(statement: str) -> str:
    return inductor._wrap(KERNEL + CALL.format(statement), TWO)


def test_statements_that_are_known_become_calls_of_the_kernels() -> None:
    text = _wrapped("cpp_fused_0(arg0_1, arg1_1, s0)")
    assert 'extern "C" void poise_run(char** p, int64_t n, int64_t length)' in text
    assert "(const float*)p[0], (float*)p[1], (int64_t)(n)" in text
    assert 'extern "C"  void kernel' not in text


@pytest.mark.parametrize(
    "statement",
    [
        "extern_kernels.mm(arg0_1, arg0_1, out=buf0)",
        "buf1 = torch.ops.aten.sort.default(arg0_1)",
        "buf1 = reinterpret_tensor(arg0_1, (s0, 2), (2, 1), 4)",
        "cpp_fused_0(arg0_1, unknown, s0)",
        "cpp_fused_0(arg0_1, arg1_1, s7)",
        "cpp_fused_0(arg0_1, arg1_1, max(s0, 3))",
        "for _ in range(2): cpp_fused_0(arg0_1, arg1_1, s0)",
    ],
)
def test_a_statement_that_is_not_known_is_never_guessed_at(statement: str) -> None:
    with pytest.raises(Unsupported):
        _wrapped(statement)


def test_output_without_kernels_is_refused() -> None:
    with pytest.raises(Unsupported):
        inductor._wrap("def call(self, args):\n    return ()", TWO)


def test_what_inductor_writes_today_is_understood() -> None:
    """Pins torch's inside: if this fails after an update of torch, rules run through torch.compile until it is mended."""
    assert "poise_run" in inductor.source_of(scaled, ARGS)


def test_a_sort_has_no_native_form() -> None:
    args = [Arg("a", torch.float32, (None, 16)), Arg("b", torch.float32, (None, 16), written=True)]
    with pytest.raises(Unsupported):
        inductor.source_of(lambda a, b: {"b": a.sort(1)[0] + b}, args)


TABLE = torch.tensor([1.0, 2.0, 4.0])


@pytest.mark.parametrize(
    "fn",
    [lambda a, b: {"b": a * torch.tensor([1.0, 2.0, 4.0]).sum() + b}, lambda a, b: {"b": a * TABLE.sum() + b}],
    ids=["made inside", "made outside"],
)
def test_tensor_constants_are_refused(fn: Any) -> None:
    """They would be missing from the kernel, and from its name on disk."""
    with pytest.raises(Unsupported):
        kernels.native(fn, TWO)


def test_a_compiler_that_fails_is_reported_with_what_it_said(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no such flag: -ffly')"]
    with pytest.raises(Unsupported, match="-ffly"):
        kernels.build("", tmp_path / "kernel.so", lambda cpp, folder: command)
    assert list(tmp_path.iterdir()) == []


# -- ways out ----------------------------------------------------------------------------------------------------------


class shifted(Transform):
    """A rule of this file alone, so that no other test has compiled it."""

    def slots(self, p: Param) -> dict[str, Slot]:
        return {"kept": Slot(tuple(p.shape))}

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        state["kept"] = 0.25 * state["kept"] + u
        return state["kept"] - 0.125


class tabled(shifted):
    def __init__(self) -> None:
        self.table = torch.tensor([1.0, 2.0])

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return super().update(u, state, x, k) * self.table[1]


@pytest.fixture
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "_said", set())
    monkeypatch.setattr(kernels, "_loaded", {})


def trained(rule: Transform, backend: Any = "auto") -> tuple[list[Tensor], list[str]]:
    """Weights after two optimizers' steps, and what was warned of."""
    ends: list[Tensor] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in (0, 1):
            start, grads = draw([(6, 5), (4,)], 3, seed=seed, dtype=torch.float32)
            params = leaves(start)
            ends += play(Optimizer(params, chain(rule), lr=0.1, backend=backend), params, grads)
    return ends, [str(w.message) for w in caught if "poise" in str(w.message)]


@pytest.mark.usefixtures("nothing_said")
@pytest.mark.parametrize("backend", ["auto", "tiles"])
def test_without_a_compiler_rules_run_in_pieces_and_it_is_said_once(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    assert kernels.compiler() is None
    found, said = trained(shifted(), backend)
    assert same(found, trained(shifted(), "chunks")[0])
    assert len(said) == 1
    assert "compiler" in said[0] and "CXX" in said[0]


@pytest.mark.usefixtures("nothing_said")
def test_what_inductor_cannot_lower_falls_back_to_torch_compile_and_it_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def unsupported(fn: Any, args: Sequence[Arg], compiler: str | None = None) -> str:
        calls.append("lowered")
        raise Unsupported("statement not understood: extern_kernels.mm(...)")

    monkeypatch.setattr(kernels, "source_of", unsupported)
    monkeypatch.setattr(torch, "compile", lambda fn, **options: calls.append("compiled") or fn)
    found, said = trained(shifted())
    assert calls.count("lowered") >= 1 and calls.count("compiled") >= 1
    assert same(found, trained(shifted(), "eager")[0])
    assert len(said) == 1
    assert "torch.compile" in said[0] and "extern_kernels.mm" in said[0]


@pytest.mark.usefixtures("nothing_said")
def test_a_rule_with_a_table_runs_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda fn, **options: fn)
    found, said = trained(tabled())
    assert same(found, trained(tabled(), "eager")[0])
    assert len(said) == 1 and "torch.compile" in said[0]


@pytest.mark.parametrize(
    ("named", "found"),
    [("/nonexistent/c++", False), (sys.executable, True), (None, True), (f"nice {sys.executable} -m64", True)],
)
def test_the_compiler_is_the_one_that_is_named_or_a_usual_one(
    named: str | None, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if named is None:
        monkeypatch.delenv("CXX", raising=False)
    else:
        monkeypatch.setenv("CXX", named)
    assert (kernels.compiler() is not None) == found
    if named and found:
        assert kernels.compiler() == sys.executable


@pytest.mark.parametrize(("works", "tried"), [(("avx2", "avx512"), 1), (("avx2",), 2), ((), 2)])
def test_the_best_vector_instructions_are_tried_and_others_only_without_them(
    works: tuple[str, ...], tried: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import config, cpu_vec_isa

    trials: list[str] = []

    class Vectors(cpu_vec_isa.VecISA):
        def __init__(self, name: str) -> None:
            self.name = name

        def __str__(self) -> str:
            return self.name

        __hash__ = cpu_vec_isa.VecISA.__hash__

        def __bool__(self) -> bool:
            if config.cpp.vec_isa_ok is not None:
                return config.cpp.vec_isa_ok
            if self.name not in trials:
                trials.append(self.name)
            return self.name in works

    monkeypatch.setattr(cpu_vec_isa, "x86_isa_checker", lambda: ["avx2", "avx512"])
    monkeypatch.setattr(cpu_vec_isa, "supported_vec_isa_list", list(map(Vectors, ("avx512 amx_tile", "avx512", "avx2"))))
    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", functools.cache(cpu_vec_isa.valid_vec_isa_list.__wrapped__))
    kernels._try_vectors()
    assert trials == ["avx512", "avx2"][:tried]
    assert str(cpu_vec_isa.pick_vec_isa()) == (works[-1] if works else "INVALID_VEC_ISA")


# -- more processes ----------------------------------------------------------------------------------------------------

VECTORS = """
from torch._inductor.cpu_vec_isa import pick_vec_isa
from poise.optim.engine import kernels
kernels.find_vectors()
print(str(pick_vec_isa()))
"""


@pytest.mark.slow
def test_a_cache_with_a_space_in_its_name_does_not_cost_the_vector_instructions(tmp_path: Path) -> None:
    found = []
    for folder in ("cache", "my cache"):
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / folder)}
        done = subprocess.run([sys.executable, "-c", VECTORS], env=environment, capture_output=True, text=True, check=True)
        found.append(done.stdout)
    assert found[0] == found[1]
    assert [path.name for path in (tmp_path / "my cache").iterdir()] == ["poise"], "the trial is made elsewhere"


PROGRAM = """
import sys, torch
from poise.optim import Optimizer
from poise.optim.transforms.step import identity
sys.stdin.readline()
p = torch.nn.Parameter(torch.arange(100.0))
opt = Optimizer([p], identity(), lr=0.5, backend="tiles")
p.grad = torch.ones(100)
opt.step()
print(float(p.detach().sum()))
"""


@pytest.mark.slow
def test_two_processes_may_fill_one_cache_at_once(tmp_path: Path) -> None:
    """They begin to compile together; each library is whole whenever it is there."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONWARNINGS": "error::UserWarning"}
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment, **pipes) for _ in range(2)]
    for process in both:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in both:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        assert float(ast.literal_eval(out.strip())) == sum(range(100)) - 50.0
    folder = tmp_path / "poise"
    assert folder.is_dir()
    assert {path.suffix for path in folder.iterdir() if not path.name.startswith("header-")} <= {".so", ".h", ".gch"}
