"""What authors' code has for CUDA, replaced: kernels by plain loops, quantizers by poise's codes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from poise.memory import asymmetric
from poise.memory.linear2 import dequantize, quantize


@contextmanager
def mfac(*modules: Any) -> Iterator[None]:
    """Of M-FAC and EFCP, and in those modules that hold names of their own for it."""
    with (
        mock.patch.object(torch, "lu", unpivoted, create=True),
        mock.patch.object(nn.parallel, "parallel_apply", one_by_one),
        mock.patch.object(torch.distributed, "is_available", return_value=False),
    ):
        for module in modules:
            module.parallel_apply, module.hinv_cuda = one_by_one, SimpleNamespace(hinv_setup=products)
        yield


def unpivoted(A: Tensor, pivot: bool = True) -> tuple[Tensor]:
    """The LU factors without pivoting, in one matrix, which torch has for CUDA only."""
    A = A.clone()
    for i in range(len(A) - 1):
        A[i + 1 :, i] /= A[i, i]
        A[i + 1 :, i + 1 :] -= torch.outer(A[i + 1 :, i], A[i, i + 1 :])
    return (A,)


def one_by_one(modules: Sequence[Any], inputs: Any) -> list[Any]:
    return [f(x) for f, x in zip(modules, inputs, strict=True)]


def products(tmp: Tensor, coef: Tensor) -> Tensor:
    for i in range(1, len(coef)):
        coef[i, :i] = tmp[i, :i] @ coef[:i, :i]
    return coef


def first_device(*_: Any) -> torch.device:
    return torch.device("cpu")


def micro_adam(block: int) -> dict[str, Any]:
    """Of MicroAdam, for blocks of so many elements."""
    tools = SimpleNamespace(
        get_sm_count=lambda: 1,
        get_max_floats_for_shared_memory_per_thread_block=lambda: 2 * block,
        copy_values=copied,
        zerorize_block_components=zeroed,
    )
    micro = SimpleNamespace(asymm_block_quant=quantized, asymm_block_quant_inv=restored, compute_microadam_update=averaged)
    return {"ista_daslab_cuda_tools": tools, "ista_daslab_cuda_micro_adam": micro, "get_first_device": first_device}


def placed(I: Tensor, d: int, size: int, many: int) -> Tensor:
    """Places within blocks as places in the whole."""
    return I.long() + torch.arange(len(I)) // many * size


def copied(d: int, k: int, size: int, many: int, I: Tensor, source: Tensor, out: Tensor, _: int) -> None:
    out.copy_(source[placed(I, d, size, many)])


def zeroed(a: Tensor, I: Tensor, d: int, k: int, size: int, many: int) -> None:
    a[placed(I, d, size, many)] = 0


def quantized(d: int, q: int, error: Tensor, lo: Tensor, hi: Tensor, a: Tensor) -> None:
    codes, low, high = asymmetric.encode(a, q)
    error.resize_(codes.shape).copy_(codes)
    lo[: len(low)], hi[: len(high)] = low, high


def restored(d: int, q: int, error: Tensor, lo: Tensor, hi: Tensor, out: Tensor, alpha: float) -> None:
    if error.ndim > 1:  # once something has been kept
        out += alpha * asymmetric.decode(error, lo[: len(error)], hi[: len(error)], d, out.dtype)


def averaged(*given: Any) -> None:
    _, _, _, step, b1, b2, eps, size, many, d, m, _, I, V, out = given
    first, second = torch.zeros(2, d, dtype=out.dtype)
    for row in range(min(step, m)):
        age, where = (step - 1 - row) % m, placed(I[row], d, size, many)
        first.index_add_(0, where, b1**age * V[row].to(out.dtype))
        second.index_add_(0, where, b2**age * V[row].to(out.dtype) ** 2)
    first *= (1 - b1) / (1 - b1**step)
    second *= (1 - b2) / (1 - b2**step)
    out.copy_(first / (second.sqrt() + eps))


def shampoo_4bit() -> dict[str, Any]:
    """The four quantizers of 4-bit Shampoo; codes are kept by the tensor that stands for them."""
    kept: dict[int, Any] = {}

    def encode(A: Tensor, code: Any, order: int, absmax: Any = None, out: Any = None, **_: Any) -> Any:
        out = torch.zeros(1) if out is None else out
        kept[id(out)] = (*quantize(A.reshape(order, order)), out)
        return out, torch.zeros(1)

    def decode(A: Tensor, code: Any, order: int, absmax: Any = None, **_: Any) -> Tensor:
        codes, scale, _out = kept[id(A)]
        return dequantize(codes, scale, order)

    def encode_rest(A: Tensor, code: Any, order: int, absmax: Any = None, diag: Any = None, out: Any = None, **_: Any) -> Any:
        A = A.reshape(order, order)
        diag = torch.zeros_like(A.diagonal()) if diag is None else diag
        diag.copy_(A.diagonal())
        return *encode(A - A.diagonal().diag(), code, order, out=out), diag

    def decode_rest(A: Tensor, code: Any, order: int, absmax: Any = None, diag: Any = None, **_: Any) -> Tensor:
        return decode(A, code, order) + diag.diag()

    return {
        "quantize_blockwise": encode,
        "dequantize_blockwise": decode,
        "quantize_blockwise_diagreal": encode_rest,
        "dequantize_blockwise_diagreal": decode_rest,
    }
