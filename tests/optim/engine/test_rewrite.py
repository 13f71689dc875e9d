"""What is replaced in generated code: it computes the same, and no longer goes through memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from poise.memory.codec import block_scale
from poise.memory.rounding import nearest_bf16, noise_bits
from poise.optim.engine import inductor, kernels
from poise.optim.engine.inductor import Arg
from poise.optim.engine.rewrite import logical_shifts, unaliased

Function = Callable[..., dict[str, Tensor]]


def narrowed(a: Tensor, **_: Tensor) -> dict[str, Tensor]:
    whole = a.to(torch.int32)
    return {"signed": whole.to(torch.int8), "bytes": whole.to(torch.uint8)}


def widened(signed: Tensor, bytes: Tensor, **_: Tensor) -> dict[str, Tensor]:
    return {"b": signed.to(torch.float32) + bytes.to(torch.float32) * 1000}


def hashed(key: Tensor, a: Tensor, **_: Tensor) -> dict[str, Tensor]:
    return {"c": noise_bits(key[0], torch.arange(a.shape[0], dtype=torch.int32) + key[1]) ^ a.view(torch.int32)}


def rounded(a: Tensor, half: Tensor, **_: Tensor) -> dict[str, Tensor]:
    return {"half": nearest_bf16(a + half.to(torch.float32))}


def hashed_beside_halves(key: Tensor, a: Tensor, half: Tensor, **_: Tensor) -> dict[str, Tensor]:
    noise = noise_bits(key[0], torch.arange(a.shape[0], dtype=torch.int32) + key[1])
    return {"half": (a + (noise & 255).to(torch.float32) + half.to(torch.float32)).to(torch.bfloat16)}


def largest(blocks: Tensor, **_: Tensor) -> dict[str, Tensor]:
    return {"scale": block_scale(blocks)}


CASES: dict[str, tuple[Function, list[Arg]]] = {
    "narrowed": (
        narrowed,
        [Arg("a", torch.float32), Arg("signed", torch.int8, written=True), Arg("bytes", torch.uint8, written=True)],
    ),
    "widened": (widened, [Arg("signed", torch.int8), Arg("bytes", torch.uint8), Arg("b", torch.float32, written=True)]),
    "hashed": (hashed, [Arg("key", torch.int32, (2,)), Arg("a", torch.float32), Arg("c", torch.int32, written=True)]),
    "largest": (
        largest,
        [Arg("blocks", torch.float32, (None, 64)), Arg("scale", torch.float32, (None, 1), written=True)],
    ),
    "rounded": (rounded, [Arg("a", torch.float32), Arg("half", torch.bfloat16, written=True)]),
    "hashed beside halves": (
        hashed_beside_halves,
        [Arg("key", torch.int32, (2,)), Arg("a", torch.float32), Arg("half", torch.bfloat16, written=True)],
    ),
}


def values(arg: Arg, n: int) -> Tensor:
    g = torch.Generator().manual_seed(len(arg.name))
    size = [n if d is None else d for d in arg.shape]
    if arg.dtype.is_floating_point:
        return (torch.randn(size, generator=g) * 300).to(arg.dtype)
    return torch.randint(-(2**31), 2**31 - 1, size, generator=g).to(arg.dtype)


@pytest.mark.parametrize("n", [1, 7, 8, 15, 16, 24, 33, 1000, 1027])
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_computes_what_eager_does_for_every_tail(name: str, n: int) -> None:
    fn, args = CASES[name]
    tensors = {arg.name: values(arg, n) for arg in args}
    expected = fn(**tensors)
    kernel = kernels.native(fn, args).result()
    pointers = np.array([tensors[arg.name].data_ptr() for arg in args], dtype=np.int64)
    ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)(kernel.address)(pointers.ctypes.data, n)
    for key, value in expected.items():
        assert torch.equal(tensors[key], value), key


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_left_that_goes_through_memory(name: str) -> None:
    """Fails if another version of inductor writes these places in another way: the kernels would be right and slow."""
    source = inductor.source_of(*CASES[name])
    generated = source[source.index("static void") :].partition("C10_UNLIKELY")[0]  # a tail may
    for slow in (
        "tmpbuf",
        "::arange(",
        "convert<uint8_t>",
        "convert<int8_t>",
        "Vectorized<at::BFloat16>::loadu",
        "vec_reduce_all",
    ):
        assert slow not in generated
    assert ("poise_shift" in generated) == ("hashed" in name or name == "rounded")


def test_only_a_shift_whose_copies_of_the_sign_are_masked_is_a_logical_one() -> None:
    source = "\n".join(
        [
            "auto tmp0 = static_cast<int32_t>(16);",
            "auto tmp1 = at::vec::Vectorized<int32_t>(tmp0);",
            "auto tmp2 = static_cast<int32_t>(65535);",
            "auto tmp3 = at::vec::Vectorized<int32_t>(tmp2);",
            "auto tmp4 = tmp9 >> tmp1;",
            "auto tmp5 = tmp4 & tmp3;",
            "auto tmp6 = static_cast<int32_t>(131071);",
            "auto tmp7 = tmp4 & tmp6;",
        ]
    )
    changed = logical_shifts(source)
    assert changed == source.replace("tmp5 = tmp4 & tmp3", "tmp5 = poise_shift<16>(tmp9)")


def test_only_a_buffer_that_stands_alone_is_promised_to_the_compiler() -> None:
    parameters = "(const float* in_ptr0,\n float* out_ptr0,\n const int64_t ks0)"
    assert unaliased(parameters, [True, False]) == parameters.replace("* in_ptr0", "* __restrict__ in_ptr0")
    assert unaliased(parameters, [True]) == parameters  # not the parameters that were expected


def test_a_tensor_that_is_read_and_written_is_not_promised() -> None:
    source = inductor.source_of(lambda a, b: {"b": a + b}, [Arg("a", torch.float32), Arg("b", torch.float32, written=True)])
    head = source[source.index("static void") :].partition("{")[0]
    assert head.count("__restrict__") == 1
