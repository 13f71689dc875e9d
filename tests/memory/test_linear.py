"""The even grids: the published linear alternative for 8-bit state."""

from __future__ import annotations

import pytest
import torch

from poise.memory import Linear8


def test_first_moments_stand_on_an_even_grid() -> None:
    codec = Linear8(block=255)
    x = (torch.arange(255) - 127.0)[None] * 0.37
    encoded = codec.encode(x, "signed")
    assert encoded["codes"][0].tolist() == list(range(-127, 128))
    torch.testing.assert_close(codec.decode(encoded, "signed"), x, rtol=1e-6, atol=0.0)


def test_second_moments_stand_on_squares() -> None:
    codec = Linear8(block=256)
    x = torch.arange(256.0)[None].square() * 1e-9
    encoded = codec.encode(x, "nonneg")
    assert encoded["codes"][0].tolist() == list(range(256))
    torch.testing.assert_close(codec.decode(encoded, "nonneg"), x, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("spread, median, most", [(0.5, 0.004, 0.02), (2.0, 0.03, 0.5)])
def test_the_error_of_the_root_grows_with_the_spread_within_a_block(spread: float, median: float, most: float) -> None:
    g = torch.Generator().manual_seed(0)
    v = torch.exp(spread * torch.randn(64, 128, generator=g))
    codec = Linear8()
    error = (codec.decode(codec.encode(v, "nonneg"), "nonneg").sqrt() / v.sqrt() - 1).abs().flatten().sort().values
    assert error[len(error) // 2].item() < median
    assert error[len(error) * 99 // 100].item() < most


def test_the_error_of_a_root_is_at_most_half_a_step() -> None:
    v = torch.rand(8, 128, generator=torch.Generator().manual_seed(0))
    codec = Linear8()
    roots = codec.decode(codec.encode(v, "nonneg"), "nonneg").sqrt()
    bound = v.amax(1, keepdim=True).sqrt() / 510
    assert ((roots - v.sqrt()).abs() <= bound * 1.001)[v.sqrt() > 2 * bound].all()
