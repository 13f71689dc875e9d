"""Matrices of few bits with one scale."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from poise.linalg.low_precision import product, quantize, turned


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def e3m2() -> Tensor:
    """Every number with a sign, 3 bits of exponent of bias 3 and 2 of mantissa."""
    fields = [(e, m) for e in range(8) for m in range(4)]
    positive = [2.0**-2 * m / 4 if e == 0 else 2.0 ** (e - 3) * (1 + m / 4) for e, m in fields]
    return torch.tensor([s * x for s in (1, -1) for x in positive], dtype=torch.float64).unique()


@pytest.mark.parametrize("precision, largest", [("int8", 127), ("fp8", 448), ("fp6", 28)])
def test_the_largest_entry_gets_the_largest_code(precision: Any, largest: float) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = draw(5, 7).to(dtype)
        x[3, 2] = -9
        codes, scale = quantize(x, precision)
        assert codes.element_size() == 1
        assert float(codes[3, 2]) == -largest
        assert float(scale) == pytest.approx(9 / largest)


def test_whole_numbers_are_rounded_to_nearest() -> None:
    x = draw(40, 30)
    codes, scale = quantize(x, "int8")
    error = (codes.double() * scale - x).abs()
    assert float(error.max()) <= 0.5 * float(scale) * (1 + 1e-9) and float(error.mean()) == pytest.approx(
        float(scale) / 4, rel=0.1
    )


def test_six_bits_are_the_nearest_of_the_sixty_three_numbers_there_are() -> None:
    table = e3m2()
    assert len(table) == 63 and float(table.max()) == 28
    x = torch.cat(
        [28 * (2 * torch.rand(4000, dtype=torch.float64) - 1), draw(4000) / 4, torch.tensor([28.0], dtype=torch.float64)]
    )
    codes, scale = quantize(x.clamp(-28, 28), "fp6")
    assert float(scale) == 1.0
    nearest = table[(x.clamp(-28, 28)[:, None] - table).abs().argmin(1)]
    assert torch.equal(codes.double(), nearest)


def test_numbers_that_a_format_has_are_kept() -> None:
    table = e3m2()
    assert torch.equal(quantize(table, "fp6")[0].double(), table)
    eighths = torch.arange(-127, 128).double()
    assert torch.equal(quantize(eighths, "int8")[0].double(), eighths)


@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (5, 7, 3), (17, 4096, 9), (0, 4, 3), (4, 3, 1)])
def test_products_of_whole_numbers_are_exact(m: int, k: int, n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-127, 128, (m, k), generator=generator, dtype=torch.int8)
    b = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
    one = torch.ones((), dtype=torch.float64)
    found = product((a, one), turned((b, one)), "int8")
    assert torch.equal(found, (a.long() @ b.long().mT).double())


@pytest.mark.parametrize("precision", ["int8", "fp8", "fp6", "none"])
def test_a_product_is_that_of_what_the_codes_stand_for(precision: Any) -> None:
    a, b = (quantize(draw(*shape, seed=seed), precision) for seed, shape in enumerate([(6, 11), (11, 4)]))
    wanted = (a[0].double() * a[1]) @ (b[0].double() * b[1])
    torch.testing.assert_close(product(a, b, precision), wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("precision", ["int8", "fp8", "fp6"])
def test_zeros_stay_zeros_and_what_is_not_finite_shows(precision: Any) -> None:
    x = draw(4, 4).float()
    zero = quantize(torch.zeros(4, 4), precision)
    assert not product(quantize(x, precision), zero, precision).any()
    for bad in (math.inf, math.nan):
        y = x.clone()
        y[1, 1] = bad
        assert not product(quantize(y, precision), quantize(x, precision), precision).isfinite().any()
