"""bfloat16 rounding and the noise behind it, checked bit by bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from poise.memory import BFloat16
from poise.memory.rounding import (
    high16,
    join,
    kahan_add,
    key_of,
    low16,
    nearest_bf16,
    noise_bits,
    split,
    stochastic_bf16,
    uniform,
    upward_bf16,
)

EVERY_RHO = torch.arange(65536, dtype=torch.int32)
# Ordinary numbers of both signs, one whose rounding carries into the exponent, denormals, and the two zeros.
PATTERNS = [0x3F8AAAAA, 0xBF8AAAAA, 0x3F7FFFFF, 0x3F800001, 0x42F6E979, 0xC2F6E979, 0x00000001, 0x00012345, 0x80012345]


def from_bits(*patterns: int) -> Tensor:
    return torch.tensor([p - 2**32 if p >= 2**31 else p for p in patterns], dtype=torch.int32).view(torch.float32)


def random_patterns(n: int, seed: int = 0) -> Tensor:
    """Random bit patterns of every exponent, without the ones that are not finite."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-(2**31), 2**31, (n,), generator=g, dtype=torch.int64).to(torch.int32).view(torch.float32)
    return x[torch.isfinite(x)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=hex)
def test_all_65536_noise_values_round_away_from_zero_exactly_as_often_as_the_low_bits_say(pattern: int) -> None:
    x = from_bits(pattern).expand(65536)
    rounded = stochastic_bf16(x.contiguous(), EVERY_RHO).double()
    towards_zero = from_bits(pattern & 0xFFFF0000).double()
    away = rounded.abs() > towards_zero.abs()
    assert int(away.sum()) == pattern & 0xFFFF
    assert rounded.unique().numel() == 2  # nothing but the two neighbours
    assert rounded.mean().item() == x[0].double().item()


@pytest.mark.parametrize("pattern", [0x3F800000, 0xBFC00000, 0x00010000, 0x7F7F0000, 0x00000000, 0x80000000], ids=hex)
def test_what_bfloat16_can_represent_never_changes(pattern: int) -> None:
    x = from_bits(pattern).expand(65536).contiguous()
    assert torch.equal(stochastic_bf16(x, EVERY_RHO).float().view(torch.int32), x.view(torch.int32))


@pytest.mark.parametrize("pattern", [0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000], ids=hex)
@pytest.mark.parametrize("rho", [0, 1, 65535])
def test_a_nan_stays_a_nan(pattern: int, rho: int) -> None:
    x, bits = from_bits(pattern), torch.tensor([rho], dtype=torch.int32)
    assert torch.isnan(stochastic_bf16(x, bits)).all()
    assert torch.isnan(upward_bf16(x)).all()


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_infinity_stays_infinity(value: float) -> None:
    x = torch.full((65536,), value)
    assert torch.equal(stochastic_bf16(x, EVERY_RHO).float(), x)
    assert torch.equal(upward_bf16(x[:1]).float(), x[:1])


def test_rounding_up_gives_the_smallest_bfloat16_that_is_not_below() -> None:
    x = random_patterns(200_000)
    up = upward_bf16(x).float()
    assert (up >= x).all()
    nearest = x.to(torch.bfloat16).float()
    assert torch.equal(up[nearest >= x], nearest[nearest >= x])  # where to nearest went up, it was the smallest


def test_rounding_to_nearest_is_what_a_cast_does() -> None:
    x = torch.cat([random_patterns(200_000), torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e-45, 3.4e38])])
    torch.testing.assert_close(nearest_bf16(x), x.to(torch.bfloat16), rtol=0.0, atol=0.0, equal_nan=True)


def test_noise_is_the_documented_hash() -> None:
    def hashed(key: int, i: int) -> int:
        x = (i * 0x9E3779B1 % 2**32) ^ (key % 2**32)
        x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
        return (x ^ (x >> 15)) * 0x846CA68B % 2**32

    index = torch.tensor([0, 1, 2, 77, 2**31 - 1, -1, -(2**31)], dtype=torch.int32)
    for key in (0, 1, -1, 123456789, -(2**31)):
        got = noise_bits(torch.tensor(key, dtype=torch.int32), index)
        assert got.dtype == torch.int32
        wanted = [hashed(key, int(i)) for i in index]
        assert [int(g) % 2**32 for g in got] == wanted
        assert high16(got).tolist() == [x >> 16 for x in wanted]
        assert low16(got).tolist() == [(x ^ x >> 16) & 0xFFFF for x in wanted]


def test_another_key_is_not_the_same_noise_further_on() -> None:
    index = torch.arange(1000, dtype=torch.int32)
    other = torch.tensor((12345 + 7 * 0x9E3779B1 + 2**31) % 2**32 - 2**31, dtype=torch.int32)
    assert (noise_bits(12345, index[7:]) != noise_bits(other, index[:-7])).all()


def test_noise_of_a_shard_is_a_slice_of_the_noise_of_the_whole() -> None:
    key, index = key_of(0, "layers.0.weight", 3), torch.arange(10_000, dtype=torch.int32)
    assert torch.equal(noise_bits(key, index)[6000:], noise_bits(key, index[6000:]))


@pytest.mark.parametrize("part", [high16, low16])
def test_noise_is_flat_and_unrelated_to_the_next_step_element_and_seed(part: Callable[[Tensor], Tensor]) -> None:
    index = torch.arange(2**20, dtype=torch.int32)

    def draw(seed: int, step: int) -> Tensor:
        return part(noise_bits(key_of(seed, "w", step), index)).double()

    x = draw(0, 1)
    assert x.min() >= 0 and x.max() <= 65535
    counts = torch.bincount((x / 256).long(), minlength=256).double()
    chi_squared = ((counts - 4096) ** 2 / 4096).sum().item()
    assert 150 < chi_squared < 380  # 255 degrees of freedom
    for other in (draw(0, 2), draw(1, 1), x.roll(1), high16(noise_bits(key_of(0, "w", 1, 1), index)).double()):
        assert abs(torch.corrcoef(torch.stack([x, other]))[0, 1].item()) < 0.004


def test_the_two_halves_of_one_hash_are_unrelated() -> None:
    noise = noise_bits(key_of(0, "w", 1), torch.arange(2**20, dtype=torch.int32))
    assert abs(torch.corrcoef(torch.stack([high16(noise).double(), low16(noise).double()]))[0, 1].item()) < 0.004


def test_uniform_numbers_lie_in_the_half_open_unit_interval() -> None:
    u = uniform(key_of(1, "w", 1), torch.arange(2**20, dtype=torch.int32)).double()
    assert u.min() >= 0 and u.max() < 1
    assert u.mean().item() == pytest.approx(0.5, abs=0.002)
    assert u.var().item() == pytest.approx(1 / 12, abs=0.0005)
    assert torch.equal(u * 2**24, (u * 2**24).round())


def test_a_key_is_the_same_in_every_process_and_version() -> None:
    assert key_of(0, "layers.0.weight", 1) == -1079037271
    assert -(2**31) <= key_of(2**40, "w", 10**9, 5) < 2**31


def test_a_key_depends_on_each_of_its_arguments() -> None:
    keys = {key_of(0, "w", 1), key_of(1, "w", 1), key_of(0, "v", 1), key_of(0, "w", 2), key_of(0, "w", 1, 1), key_of(1, "w", 0)}
    assert len(keys) == 6


def test_the_mean_of_many_weights_follows_steps_too_small_for_bfloat16() -> None:
    """1000 steps of -1e-4 from 1: nearest stays at 1; the spread is sqrt(T d 2^-8)."""
    w = torch.ones(2000, dtype=torch.bfloat16)
    still, index = w.clone(), torch.arange(2000, dtype=torch.int32)
    for step in range(1000):
        w = stochastic_bf16(w.float() - 1e-4, high16(noise_bits(key_of(0, "w", step), index)))
        still = (still.float() - 1e-4).to(torch.bfloat16)
    assert still.float().mean() == 1.0
    assert w.float().mean().item() == pytest.approx(0.9, abs=0.0016)
    assert w.float().std().item() == pytest.approx((1000 * 1e-4 * 2**-8) ** 0.5, rel=0.1)


def test_bfloat16_state_follows_a_slow_decay() -> None:
    codec = BFloat16()
    v, index = torch.full((5000,), 0.7), torch.arange(5000, dtype=torch.int32)
    for step in range(200):
        bits = high16(noise_bits(key_of(0, "w", step), index))
        v = codec.decode(codec.encode(0.999 * v, "nonneg", bits), "nonneg")
    assert v.mean().item() == pytest.approx(0.7 * 0.999**200, rel=2e-3)


def test_splitting_and_joining_gives_every_finite_float32_back_bit_for_bit() -> None:
    x = torch.cat([random_patterns(400_000), from_bits(*PATTERNS, 0, 0x80000000, 0x7F800000, 0xFF800000, 0x7F7FFFFF)])
    hi, lo = split(x)
    assert hi.dtype == torch.bfloat16 and lo.dtype == torch.int16
    assert torch.equal(join(hi, lo).view(torch.int32), x.view(torch.int32))


def test_the_upper_half_is_the_nearest_bfloat16_ties_apart() -> None:
    x = random_patterns(400_000)
    tie = (x.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(split(x)[0][~tie], x.to(torch.bfloat16)[~tie])


@pytest.mark.parametrize("pattern", [0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF], ids=hex)
def test_a_split_nan_is_a_nan_for_the_model_and_after_joining(pattern: int) -> None:
    hi, lo = split(from_bits(pattern))
    assert torch.isnan(hi).all() and torch.isnan(join(hi, lo)).all()


def test_training_on_a_split_master_is_float32_training_whose_forward_reads_bfloat16() -> None:
    g = torch.Generator().manual_seed(0)
    data, target = torch.randn(64, 16, generator=g), torch.randn(64, 4, generator=g)
    master = torch.randn(16, 4, generator=g) * 0.1
    hi, lo = split(master)

    def gradient(w: Tensor) -> Tensor:
        return data.T @ (data @ w.float() - target) / 64

    for _ in range(300):
        master = master - 1e-3 * gradient(master.to(torch.bfloat16))
        hi, lo = split(join(hi, lo) - 1e-3 * gradient(hi))
    assert torch.equal(join(hi, lo), master)


def test_kahan_follows_steps_that_nearest_loses() -> None:
    w, c = torch.ones(1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.bfloat16)
    still, step = w.clone(), torch.tensor([-1e-4], dtype=torch.bfloat16)
    for _ in range(1000):
        w, c = kahan_add(w, c, step)
        still = still + step
    assert still.item() == 1.0
    assert w.item() == pytest.approx(0.9, abs=0.004)


def test_kahan_rounds_every_line_to_bfloat16() -> None:
    """Against torch's own bfloat16 arithmetic, which rounds after each operation."""
    g = torch.Generator().manual_seed(1)
    w = torch.randn(10_000, generator=g).to(torch.bfloat16)
    c = (torch.randn(10_000, generator=g) * 1e-3).to(torch.bfloat16)
    update = (torch.randn(10_000, generator=g) * 1e-2).to(torch.bfloat16)
    residual = c + update
    new = w + residual
    got_w, got_c = kahan_add(w, c, update)
    assert torch.equal(got_w, new)
    assert torch.equal(got_c, residual + (w - new))
