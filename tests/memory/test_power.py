"""The power-law formats: the grid, rounding without bias, and what that does for moving averages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from poise.memory import CODECS, Codec, PowerMap, get
from poise.memory.codec import Kind

DEFAULTS = ["int8", "int4"]


def codec_of(name: str) -> PowerMap:
    codec = get(name)
    assert isinstance(codec, PowerMap)
    return codec


def draw(x: Tensor, g: torch.Generator) -> Tensor:
    return torch.randint(0, 65536, x.shape, generator=g, dtype=torch.int32)


def through(codec: Codec, x: Tensor, kind: Kind, bits: Tensor | None) -> Tensor:
    return codec.decode(codec.encode(x, kind, bits), kind)


@pytest.mark.parametrize("name", [name for name, codec in CODECS.items() if isinstance(codec, PowerMap)])
def test_the_codes_stand_for_powers_of_equal_steps(name: str) -> None:
    codec = codec_of(name)
    grids: list[tuple[Kind, int, int]] = [
        ("signed", 2 ** (codec.bits - 1) - 1, codec.signed),
        ("nonneg", 2**codec.bits - 1, codec.nonneg),
    ]
    for kind, levels, power in grids:
        steps = torch.arange(levels + 1).double() / levels
        x = torch.zeros(1, 256)
        x[0, : levels + 1] = (steps**power).float()
        if kind == "signed":
            x[0, levels + 1 : 2 * levels + 1] = -(steps[1:] ** power).float()
        decoded = through(replace(codec, block=256), x, kind, None).double()
        torch.testing.assert_close(decoded, x.double(), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("kind", ["signed", "nonneg"])
@pytest.mark.parametrize("name", DEFAULTS)
def test_the_mean_over_all_65536_noise_values_is_what_was_stored(name: str, kind: Kind) -> None:
    codec = replace(codec_of(name), block=8)
    x = torch.tensor([1.0, 0.9, 0.31, 0.123, 0.0456, 0.02, 0.007, 0.0])
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


def test_one_block_of_int8_second_moments_holds_six_decades_to_thirty_percent_and_nine_above_zero() -> None:
    codec = codec_of("int8")
    decades = torch.arange(128) / 127 * 6
    x = 10.0**-decades
    decoded = through(codec, x[None], "nonneg", None)[0]
    assert ((decoded / x - 1).abs() < 0.3).all()
    x[-1] = 1e-9
    assert through(codec, x[None], "nonneg", None)[0, -1].item() == pytest.approx(1e-9, rel=3)


def test_int4_spends_its_codes_on_the_largest_entries() -> None:
    x = torch.linspace(0.25, 1.0, 128)
    decoded = through(codec_of("int4"), x[None], "nonneg", None)[0]
    assert ((decoded / x - 1).abs() < 0.14).all()


def test_a_negative_extreme_is_kept_as_exactly_as_a_positive_one() -> None:
    for name in DEFAULTS:
        codec = codec_of(name)
        x = torch.zeros(1, codec.block)
        x[0, 0], x[0, 1] = -0.37, 0.37
        assert torch.equal(through(codec, x, "signed", None), x)
