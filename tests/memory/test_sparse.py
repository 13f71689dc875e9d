"""The largest entries of each block."""

from __future__ import annotations

import math

import pytest
import torch

from poise.memory.sparse import TopK, add_at, check_kept


@pytest.mark.parametrize("d", [0, 1, 9, 10, 25, 100])
@pytest.mark.parametrize("density", [0.07, 0.3, 1.0])
def test_each_block_gives_its_own_share(d: int, density: float) -> None:
    top = TopK(density, 10)
    a = torch.randn(d, generator=torch.Generator().manual_seed(0))
    places = top.choose(a)
    assert places.dtype is torch.int16
    wanted: list[int] = []
    for start in range(0, d, 10):
        block = a[start : start + 10]
        wanted += sorted(start + i for i in block.abs().topk(math.ceil(density * len(block))).indices.tolist())
    assert sorted(top.where(places, d).tolist()) == wanted
    assert top.kept(d) == len(wanted)


def test_the_last_place_of_the_largest_block_fits() -> None:
    a = torch.zeros(2**15)
    a[-1] = 1.0
    top = TopK(1e-6, 2**15)
    assert top.where(top.choose(a), len(a)).tolist() == [2**15 - 1]


def test_equal_places_add_up() -> None:
    assert add_at(torch.zeros(3), torch.tensor([1, 1, 2]), torch.tensor([1.0, 2.0, 4.0])).tolist() == [0.0, 3.0, 4.0]


def test_bad_settings_are_named() -> None:
    for wrong, name in (((0.0, 10), "density=0"), ((1.5, 10), "density=1.5"), ((0.1, 2**15 + 1), "block=32769")):
        with pytest.raises(ValueError, match=name):
            TopK(*wrong)
    with pytest.raises(ValueError, match=r"kept=torch\.float16"):
        check_kept("kept", torch.float16)
