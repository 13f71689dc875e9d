"""What every state format must keep: the contract of `poise.memory.codec`, over all formats and kinds of state."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from poise import catalog
from poise.memory import CODECS, Codec, MatrixCodec, Tapered, get
from poise.memory.codec import Kind, pack, unpack

FORMATS = sorted(name for name, codec in CODECS.items() if codec is not None and not isinstance(codec, MatrixCodec))
SCALED = [name for name in FORMATS if name != "bf16"]
KINDS: list[Kind] = ["signed", "nonneg", "upper"]


def codec_of(name: str) -> Codec:
    codec = get(name)
    assert codec is not None
    return codec


def noise(x: Tensor, seed: int = 0) -> Tensor:
    return torch.randint(0, 65536, x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def through(codec: Codec, x: Tensor, kind: Kind, bits: Tensor | None = None) -> Tensor:
    return codec.decode(codec.encode(x, kind, bits), kind)


def blocks(codec: Codec, kind: Kind, n: int = 16, seed: int = 0) -> Tensor:
    """Values over many decades, some of them exactly zero."""
    g = torch.Generator().manual_seed(seed)
    shape = (n, codec.block) if codec.block > 1 else (n * 128,)
    x = torch.randn(shape, generator=g) * torch.exp(3 * torch.randn(shape, generator=g))
    x = torch.where(torch.rand(shape, generator=g) < 0.1, 0.0, x)
    return x if kind == "signed" else x.abs()


def grid(codec: Codec, kind: Kind) -> Tensor:
    """Every value that a block of scale 1 can hold, ascending, found by decoding every code."""
    part = codec.parts(kind)["codes"]
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    if part.per_block == codec.block:
        stored = torch.zeros(256, codec.block, dtype=torch.uint8)
        stored[:, 0] = codes
    else:
        stored = codes[:, None].expand(256, part.per_block).contiguous()
    values = codec.decode({"codes": stored.view(part.dtype), "scale": torch.ones(256, 1)}, kind)[:, 0]
    return values.unique()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORMATS)
def test_the_parts_have_the_declared_dtypes_and_shapes(name: str, kind: Kind) -> None:
    codec = codec_of(name)
    x = blocks(codec, kind)
    encoded = codec.encode(x, kind, noise(x))
    assert encoded.keys() == codec.parts(kind).keys()
    for key, part in codec.parts(kind).items():
        assert encoded[key].dtype == part.dtype
        assert encoded[key].shape == ((16, part.per_block) if codec.block > 1 else x.shape)
    decoded = codec.decode(encoded, kind)
    assert decoded.shape == x.shape and decoded.dtype == torch.float32


@pytest.mark.parametrize(
    "name, most", [("bf16", 2.0), ("int8", 1.05), ("int8-dynamic", 1.05), ("int4", 0.55), ("int4-dynamic", 0.55)]
)
def test_a_format_takes_no_more_bytes_than_its_name_promises(name: str, most: float) -> None:
    for kind in KINDS:
        assert codec_of(name).bytes_per_element(kind) <= most


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORMATS)
def test_zeros_come_back_as_zeros(name: str, kind: Kind) -> None:
    codec = codec_of(name)
    x = torch.zeros_like(blocks(codec, kind))
    for bits in (None, noise(x)):
        assert torch.equal(through(codec, x, kind, bits), x)


@pytest.mark.parametrize("name", SCALED)
def test_a_block_of_zeros_is_stored_as_zero_codes_not_as_zero_times_garbage(name: str) -> None:
    codec = codec_of(name)
    encoded = codec.encode(torch.zeros(2, codec.block), "signed")
    assert codec.decode({**encoded, "scale": torch.ones(2, 1)}, "signed").count_nonzero() == 0


@pytest.mark.parametrize("name", FORMATS)
def test_signs_are_kept(name: str) -> None:
    codec = codec_of(name)
    x = blocks(codec, "signed")
    for bits in (None, noise(x)):
        decoded = through(codec, x, "signed", bits)
        assert ((decoded == 0) | (decoded.sign() == x.sign())).all()
        assert (decoded != 0).any()


@pytest.mark.parametrize("name", FORMATS)
def test_a_second_moment_above_zero_never_becomes_zero(name: str) -> None:
    """Zero in the denominator is a step of m / eps."""
    codec = codec_of(name)
    x = blocks(codec, "nonneg")
    for bits in (None, noise(x), torch.full_like(noise(x), 65535), torch.zeros_like(noise(x))):
        decoded = through(codec, x, "nonneg", bits)
        assert (decoded[x > 0] > 0).all()
        assert (decoded >= 0).all()


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=30, deadline=None)
@given(values=st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=64))
def test_upper_is_never_below_what_was_stored(name: str, values: list[float]) -> None:
    codec = codec_of(name)
    x = torch.zeros(1, codec.block) if codec.block > 1 else torch.zeros(len(values))
    x.view(-1)[: len(values)] = torch.tensor(values)
    for bits in (None, noise(x)):
        assert (through(codec, x, "upper", bits) >= x).all()


@pytest.mark.parametrize("name", SCALED)
def test_upper_takes_the_smallest_value_of_the_grid_that_is_not_below(name: str) -> None:
    codec = codec_of(name)
    x = blocks(codec, "upper")
    x[:, 0] = 1.0
    x = x.clamp(max=1.0)
    values = grid(codec, "upper")
    expected = values[torch.searchsorted(values, x)]
    decoded = through(codec, x, "upper")
    assert torch.equal(decoded[x > 0], expected[x > 0])


@pytest.mark.parametrize("kind", ["signed", "nonneg"])
@pytest.mark.parametrize("name", SCALED)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_without_noise_the_nearest_value_of_the_grid_is_chosen(name: str, kind: Kind, data: st.DataObject) -> None:
    """Against a search of the whole table; a nonneg entry above zero takes the nearest that is not zero.

    int8-linear keeps roots of second moments, so there it is the root that takes the nearest.
    """
    codec = codec_of(name)
    kept = torch.sqrt if name == "int8-linear" and kind == "nonneg" else torch.clone
    low = -1.0 if kind == "signed" else 0.0
    values = data.draw(st.lists(st.floats(low, 1.0, width=32), min_size=1, max_size=64))
    exponent = data.draw(st.integers(-60, 60))
    x = torch.zeros(1, codec.block)
    x[0, 0] = 1.0
    x[0, 1 : 1 + len(values)] = torch.tensor(values)
    table = grid(codec, kind).double()
    decoded = through(codec, x * 2.0**exponent, kind).double() / 2.0**exponent
    table = kept(table[table > 0] if kind == "nonneg" else table)
    nearest = (kept(x.double())[..., None] - table).abs().amin(-1)
    error = (kept(x.double()) - kept(decoded)).abs()
    checked = x > 0 if kind == "nonneg" else torch.ones_like(x, dtype=torch.bool)
    assert (error <= nearest + 1e-6 * kept(x.double().abs()))[checked].all()


@pytest.mark.parametrize("kind", ["signed", "nonneg"])
@pytest.mark.parametrize("name", SCALED)
def test_with_noise_one_of_the_two_neighbours_is_chosen(name: str, kind: Kind) -> None:
    codec = codec_of(name)
    x = blocks(codec, kind, seed=2)
    x[:, 0] = 50.0
    x = x.clamp(-50.0, 50.0)
    table = grid(codec, kind) * 50.0
    above = torch.searchsorted(table, x).clamp(max=len(table) - 1)
    low, high = table[(above - 1).clamp(min=0)], table[above]
    decoded = through(codec, x, kind, noise(x))
    tolerance = 1e-6 * x.abs() + (table[table > 0].min() if kind == "nonneg" else 0.0)
    assert ((decoded >= low - tolerance) & (decoded <= high + tolerance)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCALED)
def test_with_its_scale_kept_a_decoded_tensor_gets_the_same_codes(name: str, kind: Kind) -> None:
    codec = codec_of(name)
    part = codec.parts(kind)["codes"]
    codes = torch.arange(256).to(torch.uint8)
    if part.dtype == torch.int8:
        codes = codes.view(torch.int8).clamp(min=-127)
    elif name == "int4" and kind == "signed":  # -8 is no code
        codes = codes[(codes % 16 > 0) & (codes >= 16)]
    codes = torch.cat([codes, codes.max().expand(-len(codes) % part.per_block)]).reshape(-1, part.per_block).clone()
    codes[:, 0] = codes.max()  # the largest value of the block: the same scale is found again
    for scale in (1.0, 0.7310586, 3.1e-9, 1.7e21, 1e-30):
        stored = {"codes": codes, "scale": torch.full((len(codes), 1), scale)}
        x = codec.decode(stored, kind)
        for rho in (0, 32768, 65535):
            again = codec.encode(x, kind, torch.full_like(x, rho, dtype=torch.int32))
            assert torch.equal(again["scale"], stored["scale"])
            assert torch.equal(again["codes"], stored["codes"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCALED)
def test_what_is_not_finite_spoils_its_own_block_and_no_other(name: str, kind: Kind, value: float) -> None:
    codec = codec_of(name)
    x = blocks(codec, kind)
    clean = through(codec, x, kind, noise(x))
    spoiled = x.clone()
    spoiled[5, 7] = value
    decoded = through(codec, spoiled, kind, noise(x))
    assert not torch.isfinite(decoded[5]).any()
    others = torch.arange(len(x)) != 5
    assert torch.equal(decoded[others], clean[others])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("largest", [1e-45, 1e-40, 1e-37, 3e38])
def test_blocks_at_the_ends_of_the_float_range_keep_their_largest_entry(name: str, kind: Kind, largest: float) -> None:
    """Second moments of tiny gradients lie far below 1e-12; 1 / scale would overflow there."""
    codec = codec_of(name)
    x = torch.zeros(1, codec.block)
    x[0, 3] = largest
    decoded = through(codec, x, kind, noise(x))
    if isinstance(codec, Tapered) and largest < 2.0**-126:  # its scale is a normal number
        assert (decoded[0, 3] - x[0, 3]).abs() <= 2.0**-126
        assert kind == "signed" or decoded[0, 3] > 0
        assert decoded.count_nonzero() <= 1
        return
    assert decoded[0, 3] == x[0, 3]
    if name != "int4-dynamic" or kind == "signed":
        assert decoded.count_nonzero() == 1


def test_every_byte_packs_and_unpacks_to_itself() -> None:
    packed = torch.arange(256).to(torch.uint8).reshape(2, 128)
    codes = unpack(packed)
    assert codes.shape == (2, 256) and int(codes.max()) == 15
    assert torch.equal(pack(codes.to(torch.uint8)), packed)


def test_an_element_shares_its_byte_with_the_one_half_a_block_on_and_takes_the_low_bits() -> None:
    codes = torch.zeros(1, 8, dtype=torch.uint8)
    codes[0, 1], codes[0, 5] = 3, 9
    assert pack(codes).tolist() == [[0, 3 + 16 * 9, 0, 0]]


@pytest.mark.parametrize("name", FORMATS)
def test_a_codec_is_a_value(name: str) -> None:
    codec = codec_of(name)
    copy = pickle.loads(pickle.dumps(codec))
    assert copy == codec and hash(copy) == hash(codec) and copy.name == name
    assert replace(Tapered(), block=64) != Tapered()
    assert "block=64" in replace(Tapered(), block=64).name


def test_names_and_codecs_are_looked_up_alike() -> None:
    assert get("fp32") is None and get(None) is None
    assert get("int8") == Tapered() and get(Tapered(block=64)) == Tapered(block=64)


def test_an_unknown_format_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'int5'.*bf16, fp32, int4"):
        get("int5")
    with pytest.raises(TypeError, match="codec=8"):
        get(8)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FORMATS)
def test_exact_state_is_refused(name: str) -> None:
    codec = codec_of(name)
    with pytest.raises(ValueError, match=r"'exact'.*signed, nonneg, upper"):
        codec.parts("exact")  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"bits": 3}, {"block": 0}, {"bits": 4, "block": 127}], ids=str)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=str(list(wrong.values())[-1])):
        Tapered(**wrong)


def test_the_papers_formats_stand_in_the_catalog_and_build_what_the_names_mean() -> None:
    listed = {m.name: m for m in catalog.methods("memory")}
    assert {"bf16", "int8-dynamic", "int4-dynamic"} <= listed.keys()
    for name, m in listed.items():
        assert m.kind == "codec" and m.build() == get(name)
