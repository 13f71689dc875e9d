"""Statistics in one pass, beside numpy on the whole tensor in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from poise.checkpoint import StateDict
from poise.checkpoint.statistics import BARS, SPAN, Statistics, statistics, tiles


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of(tensor: Tensor, tile_bytes: int = 8 * 200) -> Statistics:
    return statistics(StateDict({"w": tensor}), "w", tile_bytes)


CASES = {
    "normal": drawn(31, 17),
    "far from zero": drawn(300, 7) * 1e-3 + 50,
    "bfloat16": drawn(40, 40).bfloat16(),
    "float16, four dimensions": drawn(9, 5, 3, 3).half(),
    "heavy tails": drawn(500, 3) ** 5,
    "float64": drawn(20, 20).double() * 1e60,
    "int8": torch.randint(-128, 128, (50, 9), generator=torch.Generator().manual_seed(0), dtype=torch.int8),
    "bool": drawn(30, 4) > 1,
    "0-d": torch.tensor(2.5),
    "one": torch.tensor([3.0]),
}


@pytest.mark.parametrize("tensor", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("tile_bytes", [1, 8 * 200, 2**25])
def test_a_pass_in_parts_gives_what_the_whole_gives(tensor: Tensor, tile_bytes: int) -> None:
    found, x = of(tensor, tile_bytes), tensor.double().numpy().ravel()
    scaled = x / max(1.0, np.abs(x).max())
    scale = max(1.0, np.abs(x).max())
    assert (found.count, found.nan, found.inf, found.zeros) == (x.size, 0, 0, int((x == 0).sum()))
    assert (found.min, found.max) == (x.min(), x.max())
    expected = {
        "mean": scaled.mean() * scale,
        "std": scaled.std() * scale,
        "rms": np.sqrt((scaled**2).mean()) * scale,
        "norm": np.linalg.norm(scaled) * scale,
        "largest": np.abs(scaled).max() / np.sqrt((scaled**2).mean()),
    }
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-12, abs=1e-300), name
    if scaled.std() > 0:
        kurtosis = ((scaled - scaled.mean()) ** 4).mean() / scaled.std() ** 4
        assert found.kurtosis == pytest.approx(kurtosis, rel=1e-9)
    else:
        assert math.isnan(found.kurtosis)


def test_outliers_are_counted_from_six_rms_on() -> None:
    tensor = drawn(100, 100)
    tensor[3, 4], tensor[5, 6], tensor[7, 8] = 50.0, -7.0, 5.0
    found = of(tensor)
    assert found.beyond == 2 / 10_000
    assert found.largest == pytest.approx(50 / found.rms)


def test_an_entry_at_the_bound_is_an_outlier() -> None:
    # 35 zeros beside a one: its size is 6 RMS, a number that bfloat16 holds.
    tensor = torch.zeros(36)
    tensor[4] = 1.0
    assert of(tensor).beyond == 1 / 36


@pytest.mark.parametrize("power", range(-3, 4))
def test_the_bound_of_outliers_is_met_to_eight_bits(power: int) -> None:
    # Entries at 1.01 times the bound count, those at 0.99 do not, wherever the bound lies between powers of two.
    tensor = torch.ones(10_000) * 1.3**power
    rms = 1.3**power
    for _ in range(20):
        tensor[0], tensor[1] = 6 * rms * 1.01, -6 * rms * 0.99
        rms = float(tensor.double().square().mean().sqrt())
    assert of(tensor).beyond == 1 / 10_000


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    tensor = drawn(30, 10)
    clean = tensor.clone()
    clean[25, 3] = clean[27, 0] = clean[27, 1] = 0
    tensor[25, 3], tensor[27, 0], tensor[27, 1] = math.nan, math.inf, -math.inf
    found = of(tensor)
    assert (found.nan, found.inf, found.first_bad) == (1, 2, (25, 3))
    assert found.norm == pytest.approx(float(clean.double().norm()), rel=1e-12)
    assert found.mean == pytest.approx(float(clean.double().sum()) / 297, rel=1e-9)
    assert of(clean).first_bad is None


def test_dead_rows_and_columns_are_counted_across_parts() -> None:
    tensor = drawn(40, 30)
    tensor[[0, 17, 39]] = 0
    tensor[24:30] = 0  # a part by itself
    tensor[:, 5] = 0
    found = of(tensor)
    assert (found.zero_rows, found.zero_columns) == (9, 1)
    conv = drawn(6, 4, 3, 3)
    conv[2] = 0
    assert (of(conv).zero_rows, of(conv).zero_columns) == (1, 0)
    assert (of(torch.zeros(5)).zero_rows, of(torch.zeros(5)).zero_columns) == (0, 0)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (3, 0, 2)])
def test_an_empty_tensor_has_no_statistics(shape: tuple[int, ...]) -> None:
    found = of(torch.zeros(shape))
    assert found.count == 0 and found.norm == 0 and found.histogram == ()
    assert all(math.isnan(value) for value in (found.min, found.max, found.mean, found.std, found.rms, found.largest))


def test_squares_beyond_float64_are_infinite_and_no_crash() -> None:
    found = of(drawn(20, 20).double() * 1e200)
    assert found.norm == math.inf and math.isnan(found.kurtosis) and 1e200 < found.max < 1e201


def test_only_nan_is_no_number() -> None:
    found = of(torch.full((3,), math.nan))
    assert (found.count, found.nan) == (3, 3) and math.isnan(found.rms) and found.histogram == ()


def test_a_histogram_holds_every_entry_once_where_it_lies() -> None:
    tensor = torch.cat([drawn(100_000), torch.full((1000,), 100.0), torch.zeros(5000)])
    found = of(tensor, 2**25)
    width = 2 * SPAN / BARS * found.rms
    assert sum(found.histogram) == pytest.approx(1.0, abs=1e-12)
    assert found.histogram[-1] * found.count == pytest.approx(1000, abs=1)
    true, _ = np.histogram(tensor[tensor < 99].numpy(), bins=np.linspace(-SPAN, SPAN, BARS + 1) * found.rms)
    halves = true.astype(float)
    at = BARS // 2
    halves[at] -= 2500  # numpy puts zeros to the right, here they lie on both sides of the edge
    halves[at - 1] += 2500
    assert width > 0
    np.testing.assert_allclose(np.array(found.histogram[:-1]) * found.count, halves[:-1], atol=0.02 * 100_000)


def test_parts_take_no_more_than_asked_for() -> None:
    checkpoint = StateDict({"w": torch.zeros(100, 8)})
    assert [len(part) for part in tiles(checkpoint, "w", 8 * 8 * 30)] == [30, 30, 30, 10]
    assert [len(part) for part in tiles(checkpoint, "w", 1)] == [1] * 100


def test_complex_entries_count_as_two_numbers() -> None:
    tensor = torch.complex(drawn(6, 5), drawn(6, 5, seed=1))
    assert of(tensor).norm == pytest.approx(float(torch.linalg.vector_norm(tensor.to(torch.complex128))), rel=1e-12)
