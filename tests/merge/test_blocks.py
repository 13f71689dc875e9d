"""Rows cut anew into blocks that depend on the tensor alone."""

from __future__ import annotations

import pytest
import torch

from merge.cutting import pieces
from poise.merge.blocks import ENTRIES, Blocks
from poise.merge.protocol import Place


@pytest.mark.parametrize("shape", [(1000, 300), (70_001,), (3, ENTRIES + 5), (2, 3, 5), (), (0, 4)], ids=str)
def test_blocks_are_the_same_however_the_rows_come(shape: tuple[int, ...]) -> None:
    t = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = []
    for sizes in ((10**9,), (7, 333, 1000), (1,) if len(t.shape) == 2 else (4999,)):
        blocks, whole = Blocks(), []
        for start, stop in pieces(t.shape, sizes):
            place = Place("t", t.shape, start, 17 + start * t.shape[1:].numel())
            rows = t[start:stop] if t.ndim else t
            whole += [(here.start, here.offset, a, b) for here, (a, b) in blocks.cut(place, [rows, 2 * rows])]
        found.append(whole)
    for one in found:
        assert [(s, o) for s, o, _, _ in one] == [(s, o) for s, o, _, _ in found[0]]
        assert all(torch.equal(a, c) for (_, _, a, _), (_, _, c, _) in zip(one, found[0], strict=True))
        assert all(torch.equal(b, 2 * a) and a.dtype == torch.float64 for _, _, a, b in one)
        if one:
            assert torch.equal(torch.cat([a for _, _, a, _ in one]).reshape(shape).float(), t)
            assert all(o == 17 + s * t.shape[1:].numel() for s, o, _, _ in one)
        assert all(a.numel() <= max(ENTRIES, t.shape[1:].numel()) for _, _, a, _ in one)
