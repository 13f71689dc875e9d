"""The published 8-bit and 4-bit maps, against what the papers' tables say."""

from __future__ import annotations

import pytest
import torch
from conformance.cases import mutated
from torch import Tensor

from poise import catalog
from poise.memory import Dynamic4, Dynamic8
from poise.memory.codec import Codec, Kind

KINDS: tuple[Kind, ...] = ("signed", "nonneg")


def table8(signed: bool) -> Tensor:
    """The dynamic map as it is built for a lookup: midpoints of equal cells of [0.1, 1], decade by decade, with 0 and 1."""
    values = [torch.tensor([0.0, 1.0], dtype=torch.float64)]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1, dtype=torch.float64)
        cells = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (i - 6)
        values += [cells, -cells] if signed else [cells]
    return torch.cat(values).sort().values


def decoded8(kind: Kind) -> Tensor:
    codes = torch.arange(256).to(torch.uint8)[None]
    return Dynamic8().decode({"codes": codes, "scale": torch.ones(1, 1)}, kind)[0].double()


def per_decade(values: Tensor) -> list[int]:
    """How many of the values lie in (1e-7, 1e-6], ..., (0.1, 1]."""
    return [int(((values > 10.0**-i) & (values <= 10.0 ** (1 - i))).sum()) for i in range(7, 0, -1)]


@pytest.mark.parametrize("kind", ["signed", "nonneg"])
def test_the_computed_map_is_the_table(kind: Kind) -> None:
    torch.testing.assert_close(decoded8(kind), table8(kind == "signed"), rtol=1e-6, atol=0.0)


def test_facts_of_the_signed_map() -> None:
    values = decoded8("signed")
    assert int((values < 0).sum()) == 127 and values[127] == 0
    assert values[128].item() == pytest.approx(5.5e-7) and values[0].item() == pytest.approx(-0.99296875)
    assert values[255] == 1 and -1.0 not in values
    assert per_decade(values[128:255]) == [1, 2, 4, 8, 16, 32, 64]


def test_facts_of_the_map_of_second_moments() -> None:
    values = decoded8("nonneg")
    assert values[0] == 0 and (values[1:] > 0).all()
    assert values[1:3].tolist() == pytest.approx([3.25e-7, 7.75e-7])
    assert values[-2:].tolist() == pytest.approx([0.996484375, 1.0])
    assert per_decade(values[1:255]) == [2, 4, 8, 16, 32, 64, 128]


def table4(signed: bool) -> Tensor:
    """The two published maps of 16 values."""
    if not signed:
        return torch.arange(1, 17, dtype=torch.float64) / 16
    above = torch.tensor([0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875], dtype=torch.float64)
    return torch.cat([-above, torch.tensor([0.0, 1.0]).double(), above]).sort().values


def off(codec: Codec, kind: Kind, table: Tensor) -> float:
    """Largest distance to the nearer value of the map, relative, just below and just above every border between two."""
    border = (table[1:] + table[:-1]) / 2
    step = (table[1:] - table[:-1]) * 1e-3
    found, wanted = [], []
    for side, expected in ((-1, table[:-1]), (1, table[1:])):
        x = torch.cat([border + side * step, torch.ones(codec.block - len(border)).double()])[None].float()
        found.append(codec.decode(codec.encode(x, kind), kind)[0, : len(border)].double())
        # zero is for zeros
        wanted.append(expected.clamp(min=table[table > 0].min().item()) if kind == "nonneg" else expected)
    gap = torch.cat(found) - torch.cat(wanted)
    return float((gap / torch.cat(wanted).abs().clamp(min=1e-30)).abs().max())


def test_at_every_border_between_two_codes_the_nearer_one_is_chosen() -> None:
    for kind in KINDS:
        assert off(Dynamic8(), kind, table8(kind == "signed")) < 1e-6
        assert off(Dynamic4(), kind, table4(kind == "signed")) < 1e-5


def test_the_borders_tell_the_8_bit_format_from_its_mutant() -> None:
    wrong = mutated(catalog.get("int8-dynamic"))
    assert max(off(wrong(), kind, table8(kind == "signed")) for kind in KINDS) > 0.01


def test_the_borders_tell_the_4_bit_format_from_its_mutant() -> None:
    wrong = mutated(catalog.get("int4-dynamic"))
    assert max(off(wrong(), kind, table4(kind == "signed")) for kind in KINDS) > 0.01


def test_a_negative_extreme_shrinks_for_there_is_no_minus_one() -> None:
    x = torch.zeros(1, 256)
    x[0, 0] = -2.0
    assert Dynamic8().decode(Dynamic8().encode(x, "signed"), "signed")[0, 0].item() == pytest.approx(-2 * 0.99296875)


def test_the_four_bit_maps_are_the_published_ones() -> None:
    codec, codes = Dynamic4(block=16), torch.arange(16).to(torch.uint8)
    stored = {"codes": (codes[:8] | (codes[8:] << 4))[None], "scale": torch.ones(1, 1)}
    torch.testing.assert_close(codec.decode(stored, "signed")[0].double(), table4(True), rtol=0.0, atol=1e-6)
    assert torch.equal(codec.decode(stored, "nonneg")[0].double(), table4(False))


def test_four_bit_second_moments_are_never_below_a_sixteenth_of_the_scale() -> None:
    x = torch.rand(8, 128, generator=torch.Generator().manual_seed(0)) ** 8
    decoded = Dynamic4().decode(Dynamic4().encode(x, "nonneg"), "nonneg")
    assert (decoded >= x.amax(1, keepdim=True) / 16 * (1 - 1e-6)).all()
