"""The tapered formats: the grid, rounding without bias, and what that does for moving averages."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from poise.memory import Codec, Tapered, get
from poise.memory.codec import Kind

DEFAULTS = ["int8", "int4"]


def codec_of(name: str) -> Tapered:
    codec = get(name)
    assert isinstance(codec, Tapered)
    return codec


def draw(x: Tensor, g: torch.Generator) -> Tensor:
    return torch.randint(0, 65536, x.shape, generator=g, dtype=torch.int32)


def through(codec: Codec, x: Tensor, kind: Kind, bits: Tensor | None) -> Tensor:
    return codec.decode(codec.encode(x, kind, bits), kind)


def place(y: float) -> float:
    """The logarithm to base 2, made linear within each octave."""
    mantissa, exponent = math.frexp(y)
    return exponent - 1 + 2 * mantissa - 1


def number(place: float) -> float:
    """Its inverse."""
    return math.ldexp(1 + place % 1, math.floor(place))


def expected_grid(levels: int, q: int) -> Tensor:
    """F(c) / F(n) by the definition."""
    line = number(q * place(q))
    values = [number(q * place(c)) if c >= q else c * line / q for c in range(levels + 1)]
    return torch.tensor(values, dtype=torch.float64) / values[-1]


GRIDS: list[tuple[str, Kind, int, int]] = [
    ("int8", "signed", 127, 4), ("int8", "nonneg", 255, 4), ("int4", "signed", 7, 2), ("int4", "nonneg", 15, 2)
]  # fmt: skip


@pytest.mark.parametrize("name, kind, levels, q", GRIDS)
def test_the_codes_stand_for_powers_with_a_piecewise_linear_logarithm(name: str, kind: Kind, levels: int, q: int) -> None:
    values = expected_grid(levels, q)
    x = torch.zeros(1, 256)
    x[0, : levels + 1] = values.float()
    decoded = through(replace(codec_of(name), block=256), x, kind, None)[0, : levels + 1].double()
    torch.testing.assert_close(decoded, values, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("name, kind, levels, q", GRIDS)
def test_every_border_between_octaves_is_on_the_grid_so_that_rounding_is_even_between_neighbours(
    name: str, kind: Kind, levels: int, q: int
) -> None:
    values = expected_grid(levels, q)
    top = number(q * place(levels))
    octaves = [2.0**e / top for e in range(int(q * place(q)), int(math.log2(top)) + 1)]
    for border in octaves:
        assert (values / border - 1).abs().min().item() < 1e-12


def test_eight_bits_give_thirty_two_codes_to_each_of_the_largest_octaves_and_one_to_the_smallest() -> None:
    values = expected_grid(255, 4) * (2 - 2.0**-5)  # the last octave ends at 2
    counts = [int(((values >= 2.0**-e) & (values < 2.0 ** (1 - e))).sum()) for e in range(24)]
    assert counts == [32] * 4 + [16] * 4 + [8] * 4 + [4] * 4 + [2] * 4 + [1] * 4


@pytest.mark.parametrize("kind", ["signed", "nonneg"])
@pytest.mark.parametrize("name", DEFAULTS)
def test_the_mean_over_all_65536_noise_values_is_what_was_stored(name: str, kind: Kind) -> None:
    codec = replace(codec_of(name), block=8)
    x = torch.tensor([1.0, 0.9, 0.31, 0.123, 0.0456, 0.02, 0.0123, 0.0])
    x = x * torch.tensor([1, -1, 1, -1, 1, -1, 1, 1]) if kind == "signed" else x
    every = torch.arange(65536, dtype=torch.int32)[:, None].expand(65536, 8).contiguous()
    decoded = through(codec, x.expand(65536, 8).contiguous(), kind, every).double()
    spacing = decoded.amax(0) - decoded.amin(0)
    assert (spacing[1:-1] > 0).all()
    assert ((decoded.mean(0) - x.double()).abs() <= spacing * 2**-16 + 1e-7 * x.abs()).all()


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_slow_moving_average_follows_its_input_which_to_nearest_it_does_not(name: str) -> None:
    """Entries at half the block's largest, decaying by 0.999 a step."""
    codec, g = codec_of(name), torch.Generator().manual_seed(0)
    start = torch.full((32, codec.block), 0.5)
    start[:, 0] = 1.0
    v, still = start, start
    keep = torch.full((codec.block,), 0.999)
    keep[0] = 1.0
    for _ in range(200):
        v = through(codec, keep * v, "nonneg", draw(v, g))
        still = through(codec, keep * still, "nonneg", None)
    exact = 0.5 * 0.999**200
    assert v[:, 1:].mean().item() == pytest.approx(exact, rel=0.03)
    assert still[:, 1:].mean().item() > 1.15 * exact


@pytest.mark.parametrize("name", DEFAULTS)
def test_an_entry_whose_gradient_has_vanished_comes_to_rest_which_to_nearest_it_does_not(name: str) -> None:
    """m decays faster than sqrt(v), so m / sqrt(v) must vanish, although the block's other entries keep its scale up."""
    codec, g = codec_of(name), torch.Generator().manual_seed(0)
    start = torch.full((32, codec.block), 0.3)
    start[:, 0] = 1.0  # keeps the scale where it is

    def after(noisy: bool) -> float:
        m, v = start, start**2
        for _ in range(200):
            m, v = 0.9 * m, 0.95 * v
            m[:, 0], v[:, 0] = 1.0, 1.0
            m = through(codec, m, "signed", draw(m, g) if noisy else None)
            v = through(codec, v, "nonneg", draw(v, g))
        return (m / v.sqrt())[:, 1:].square().mean().sqrt().item()

    assert after(noisy=True) < 0.05
    assert after(noisy=False) > 0.2


def test_one_block_of_int8_second_moments_holds_six_decades_to_a_third_and_nothing_falls_to_zero() -> None:
    codec = codec_of("int8")
    x = 10.0 ** -(torch.arange(128) / 127 * 6)
    error = (through(codec, x[None], "nonneg", None)[0] / x - 1).abs()
    assert (error[x > 1e-2] < 0.04).all() and (error < 1 / 3).all()
    x[-1] = 1e-9
    assert through(codec, x[None], "nonneg", None)[0, -1].item() == pytest.approx(2**-26 / (1 - 2**-6), rel=1e-5)


def test_int4_spends_its_codes_on_the_largest_entries() -> None:
    x = torch.linspace(0.25, 1.0, 128)
    decoded = through(codec_of("int4"), x[None], "nonneg", None)[0]
    assert ((decoded / x - 1).abs() < 0.15).all()


@pytest.mark.parametrize("name, low, spread", [("int8", 0.01, 0.1), ("int4", 0.07, 0.35)])
def test_moving_averages_of_squared_noise_stay_where_they_are(name: str, low: float, spread: float) -> None:
    """The root of v, beside that of v kept in float32; the figures of the docstring."""
    codec, g = codec_of(name), torch.Generator().manual_seed(0)
    size = torch.exp(0.5 * torch.randn(16, codec.block, generator=g))
    v = exact = torch.zeros(16, codec.block)
    for _ in range(1500):
        square = (size * torch.randn(size.shape, generator=g)) ** 2
        exact = 0.999 * exact + 0.001 * square
        v = through(codec, 0.999 * v + 0.001 * square, "nonneg", draw(v, g))
    ratio = (v / exact).log() / 2
    assert -low < ratio.mean().item() < 0.005
    assert ratio.std().item() < spread


def test_a_negative_extreme_is_kept_as_exactly_as_a_positive_one() -> None:
    for name in DEFAULTS:
        codec = codec_of(name)
        x = torch.zeros(1, codec.block)
        x[0, 0], x[0, 1] = -0.37, 0.37
        assert torch.equal(through(codec, x, "signed", None), x)
