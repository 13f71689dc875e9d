"""Rows on their way to the disk: rounded to nearest, and refused where the stored dtype has no place for them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from poise.checkpoint import CheckpointError, Planned
from poise.checkpoint.casting import Caster
from poise.checkpoint.shards import ORDER

FLOATS = [dtype for dtype in ORDER if dtype.is_floating_point and dtype != torch.float8_e8m0fnu]


def cast(rows: Tensor, dtype: torch.dtype, **other: Any) -> Tensor:
    tensor = Planned("w", rows.shape, dtype)
    data = Caster(tensor.nbytes, **other)(tensor, 0, len(rows), rows)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).view(rows.shape)


def bits(dtype: torch.dtype, first: int) -> Tensor:
    """A stretch of the numbers of a two-byte dtype, in order."""
    return torch.arange(first, first + 200, dtype=torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_to_the_nearest_and_of_two_as_near_to_the_even_one(dtype: torch.dtype) -> None:
    numbers = bits(dtype, 0x3C00)
    low, high = numbers[:-1].double(), numbers[1:].double()
    for part, kept in ((0.5 - 2**-10, low), (0.5 + 2**-10, high)):
        assert torch.equal(cast((low + part * (high - low)).float(), dtype).double(), kept)
    even = torch.where(torch.arange(199) % 2 == 0, low, high)
    assert torch.equal(cast(((low + high) / 2).float(), dtype).double(), even)
    assert torch.equal(cast(-((low + high) / 2).float(), dtype).double(), -even)


@pytest.mark.parametrize("dtype", [dtype for dtype in FLOATS if dtype.itemsize < 4], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_too_large_is_refused_and_the_largest_number_is_not(dtype: torch.dtype, sign: int) -> None:
    largest = torch.finfo(dtype).max
    place = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(largest))  # its last
    rows = torch.tensor([0.0, sign * (largest + 0.49 * place), 1.0], dtype=torch.float64)
    assert torch.equal(cast(rows, dtype).double(), torch.tensor([0.0, sign * largest, 1.0], dtype=torch.float64))
    rows[1] = sign * (largest + 0.51 * place)
    with pytest.raises(
        CheckpointError, match=r"^tensor 'w': rows \[0, 3\) hold .* and the largest number in .*; store it in"
    ) as refused:
        cast(rows, dtype)
    assert refused.value.tensor == "w"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("what, said", [(math.nan, "NaN"), (math.inf, "infinity"), (-math.inf, "infinity")])
def test_nan_and_infinity_are_refused_unless_they_are_as_they_should_be(dtype: torch.dtype, what: float, said: str) -> None:
    rows = torch.tensor([1.0, what, 2.0])
    with pytest.raises(CheckpointError, match=rf"tensor 'w': rows \[0, 3\) hold {said}; look for it in the inputs"):
        cast(rows, dtype)
    asked: list[tuple[str, int, int]] = []

    def nonfinite(tensor: Planned, start: int, stop: int) -> bool:
        asked.append((tensor.name, start, stop))
        return True

    found = cast(rows, dtype, nonfinite=nonfinite).float()
    assert found[0] == 1 and found[2] == 2 and asked == [("w", 0, 3)]
    with pytest.raises(CheckpointError, match=said):
        cast(rows, dtype, nonfinite=lambda tensor, start, stop: False)
    assert cast(torch.ones(3), dtype, nonfinite=lambda *_: pytest.fail("asked without need")).float().sum() == 3


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_same_dtype_goes_through_with_every_bit(dtype: torch.dtype) -> None:
    rows = torch.randn(64, 8).to(dtype)
    rows[0, 0] = -0.0
    assert torch.equal(cast(rows, dtype).view(torch.uint8), rows.view(torch.uint8))


def test_nan_of_a_narrow_float_is_seen_too() -> None:
    rows = torch.tensor([1.0, math.nan]).to(torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match="hold NaN"):
        cast(rows, torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_integers_and_bools_take_only_what_they_hold(dtype: torch.dtype) -> None:
    assert torch.equal(cast(torch.tensor([1.0, 0.0, 1.0]), dtype), torch.tensor([1, 0, 1]).to(dtype))
    for rows in (torch.tensor([0.5, 1.0]), torch.tensor([math.nan]), torch.tensor([2**40 + 0.5], dtype=torch.float64)):
        with pytest.raises(
            CheckpointError, match=r"hold values that .* does not; hand such tensors through in their own dtype"
        ):
            cast(rows, dtype)


def test_an_integer_that_is_too_long_is_refused() -> None:
    with pytest.raises(CheckpointError, match="are int64 and hold values that int32 does not"):
        cast(torch.tensor([2**40]), torch.int32)
    with pytest.raises(CheckpointError, match="the largest number in float16 is 65504"):
        cast(torch.tensor([70_000]), torch.float16)


def test_exponents_take_powers_of_two() -> None:
    assert torch.equal(cast(torch.tensor([0.25, 8.0]), torch.float8_e8m0fnu).float(), torch.tensor([0.25, 8.0]))
    with pytest.raises(CheckpointError, match="hold values that float8_e8m0fnu does not"):
        cast(torch.tensor([0.25, 3.0]), torch.float8_e8m0fnu)


def test_complex_numbers_lose_no_part() -> None:
    rows = torch.tensor([1 + 2j, 3 - 4j])
    assert torch.equal(cast(rows, torch.complex64), rows)
    assert torch.equal(cast(rows.conj(), torch.complex64), rows.conj().resolve_conj())
    with pytest.raises(CheckpointError, match="complex; store it in complex64"):
        cast(rows, torch.float32)
    with pytest.raises(CheckpointError, match="hold infinity"):
        cast(torch.tensor([complex(0, math.inf)]), torch.complex64)


def test_one_buffer_serves_all_rows() -> None:
    tensor = Planned("w", torch.Size([4, 2]), torch.bfloat16)
    caster = Caster(8)
    first = caster(tensor, 0, 2, torch.ones(2, 2))
    second = caster(tensor, 2, 4, torch.zeros(2, 2))
    assert bytes(first) == bytes(second) == bytes(8)
