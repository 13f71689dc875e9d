"""Four bits between the ends of a block."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from poise.memory.asymmetric import decode, encode, shape


def through(a: Tensor, block: int) -> Tensor:
    return decode(*encode(a, block), a.numel(), a.dtype)


@pytest.mark.parametrize("d", [0, 1, 2, 7, 63, 64, 65, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_number_is_further_than_half_a_unit_from_its_code(d: int, dtype: torch.dtype) -> None:
    """The ends are rounded outwards: to nearest, those of a narrow block far from zero would cut numbers off."""
    for shift, width in ((0.0, 1.0), (5.0, 1e-3), (-100.0, 0.2)):
        a = shift + width * torch.randn(d, generator=torch.Generator().manual_seed(d), dtype=torch.float64).to(dtype)
        codes, lo, hi = encode(a, 64)
        unit = ((hi.double() - lo.double()) / 15).repeat_interleave(shape(d, 64)[1])[:d]
        assert bool(((through(a, 64) - a).abs().double() <= unit / 2 * (1 + 1e-5) + 1e-6 * abs(shift)).all())
        assert codes.nbytes <= d / 2 + 32
        for values, low, high in zip(a.split(64) if d else (), lo, hi, strict=True):
            assert low <= values.min()
            assert values.max() <= high


def test_ends_and_zeros_that_bfloat16_holds_are_exact() -> None:
    a = torch.tensor([-2.0, 1.0, 0.0, 13.0, 5.0, 0.0])
    assert torch.equal(through(a, 64), a)
    assert torch.equal(through(torch.zeros(70), 64), torch.zeros(70))
    assert torch.equal(through(torch.full((70,), 3.0), 64), torch.full((70,), 3.0))


def test_what_is_not_finite_spoils_its_own_block_alone() -> None:
    a = torch.ones(128)
    a[70] = torch.inf
    found = through(a, 64)
    assert torch.equal(found[:64], a[:64])
    assert found[64:].isnan().all()
